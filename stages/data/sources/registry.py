"""Registry of data sources by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.sources.image_folder import list_image_folder
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.sources.npz import list_npz
from kdpipe.stages.data.sources.torchvision import NAMES as TORCHVISION_NAMES
from kdpipe.stages.data.sources.torchvision import list_digits, list_torchvision
from kdpipe.stages.data.sources.user_function import list_python
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError, RecipeError, UnknownDataError

KNOWN_NAMES = ("digits", *TORCHVISION_NAMES, "imagefolder:PATH", "npz:PATH", "python:MODULE:FUNCTION")


def list_source(config: DataConfig, split: Split, size: int | None) -> Listing:
    """List the samples of the data set `config.name`; files are to be decoded to `size`.

    Raises:
        UnknownDataError: There is no such source.
        RecipeError: `test_crop` is set where it does not apply.
    """
    kind, colon, argument = config.name.partition(":")
    root = _path(config.root)
    if colon and argument and kind == "imagefolder":
        return list_image_folder(_path(argument, below=root), split, _decode_spec(config, split, size))
    if config.test_crop != 1:
        raise RecipeError(
            f"data.test_crop applies only to imagefolder:PATH, but data.name is {config.name!r}: remove it."
        )
    if config.name == "digits":
        return list_digits()
    if config.name in TORCHVISION_NAMES:
        return list_torchvision(config.name, split, root=root, download=config.download)
    if colon and argument and kind == "npz":
        return list_npz(_path(argument, below=root), split)
    if colon and argument and kind == "python":
        return list_python(argument, split, root=root)
    raise UnknownDataError(_unknown(config.name))


def _decode_spec(config: DataConfig, split: Split, size: int | None) -> DecodeSpec:
    channels = config.channels or 3
    if split == "train":
        return DecodeSpec(channels, size)
    if config.test_crop != 1 and size is None:
        raise RecipeError("data.test_crop needs a size for the cropped images: set data.image_size.")
    return DecodeSpec(channels, size, config.test_crop)


def _path(text: str, below: Path | None = None) -> Path:
    """Return `text` as an absolute path with `~` expanded, relative to `below`, without `.` and `..`."""
    try:
        path = (below or Path()) / Path(text).expanduser()
    except RuntimeError as error:  # ~user of an unknown user
        raise DataError(f"cannot expand {text!r}: there is no such home folder. Give an absolute path.") from error
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links and change the folder's name


def _unknown(name: str) -> str:
    folded = {known.partition(":")[0].lower(): known for known in KNOWN_NAMES}
    near = difflib.get_close_matches(name.partition(":")[0].lower(), folded, n=2)
    advice = f" Did you mean {' or '.join(folded[name] for name in near)}?" if near else ""
    return f"unknown data set data.name={name!r}.{advice} Known names: {', '.join(KNOWN_NAMES)}."
