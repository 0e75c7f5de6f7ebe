"""Where a data set's name leads: to one of the rooms that list the samples of a source."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from stages.datasets.config import DataConfig
from stages.datasets.digits import list_digits
from stages.datasets.image_folder import list_image_folder
from stages.datasets.listing import Listing
from stages.datasets.npz import list_npz
from stages.datasets.pixels import Form
from stages.datasets.python_source import list_python
from stages.datasets.split import Split
from stages.datasets.torchvision_sets import NAMES as TORCHVISION_NAMES
from stages.datasets.torchvision_sets import list_torchvision
from stages.errors import DataError, RecipeError, UnknownDataError

KNOWN_NAMES = ("digits", *TORCHVISION_NAMES, "imagefolder:PATH", "npz:PATH", "python:MODULE:FUNCTION")


def list_source(config: DataConfig, split: Split, size: int | None) -> Listing:
    """List the samples of the data set that `config` names; files are to be decoded to `size`.

    UnknownDataError if there is no such source; RecipeError for a crop where there is nothing to crop.
    """
    kind, colon, argument = config.name.partition(":")
    root = _path(config.root)
    if colon and argument and kind == "imagefolder":
        return list_image_folder(_path(argument, below=root), split, _form(config, split, size))
    if config.test_crop != 1:
        raise RecipeError(f"data.test_crop is for imagefolder:PATH alone, data.name is {config.name!r}: leave it out.")
    if config.name == "digits":
        return list_digits()
    if config.name in TORCHVISION_NAMES:
        return list_torchvision(config.name, split, root=root, download=config.download)
    if colon and argument and kind == "npz":
        return list_npz(_path(argument, below=root), split)
    if colon and argument and kind == "python":
        return list_python(argument, split, root=root)
    raise UnknownDataError(_unknown(config.name))


def _form(config: DataConfig, split: Split, size: int | None) -> Form:
    channels = config.channels or 3
    if split == "train":
        return Form(channels, size)
    if config.test_crop != 1 and size is None:
        raise RecipeError("data.test_crop needs a size to which the cropped images are resized: set data.image_size.")
    return Form(channels, size, config.test_crop)


def _path(text: str, below: Path | None = None) -> Path:
    """`text` with its `~` expanded, below another folder unless it is absolute, without `.` and `..`."""
    try:
        path = (below or Path()) / Path(text).expanduser()
    except RuntimeError as error:  # ~somebody, where there is no such user
        raise DataError(f"{text!r} has no home folder to start from: write the whole path.") from error
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links and change the folder's name


def _unknown(name: str) -> str:
    folded = {known.partition(":")[0].lower(): known for known in KNOWN_NAMES}
    near = difflib.get_close_matches(name.partition(":")[0].lower(), folded, n=2)
    advice = f" Did you mean {' or '.join(folded[each] for each in near)}?" if near else ""
    return f"unknown data set data.name={name!r}.{advice} Known are {', '.join(KNOWN_NAMES)}."
