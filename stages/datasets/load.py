"""The recipe's `data` section, and the one way to a data set: by its name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from pydantic import Field

from stages.config import section
from stages.datasets.digits import list_digits
from stages.datasets.image_folder import list_image_folder
from stages.datasets.image_set import ImageSet
from stages.datasets.listing import Listing
from stages.datasets.npz import list_npz
from stages.datasets.pixels import with_channels, with_size
from stages.datasets.python_source import list_python
from stages.datasets.split import Rows, Split, stratified_split, stratified_subset
from stages.datasets.torchvision_sets import NAMES as TORCHVISION_NAMES
from stages.datasets.torchvision_sets import list_torchvision
from stages.errors import DataError, UnknownDataError

KNOWN_NAMES = ("digits", *TORCHVISION_NAMES, "imagefolder:PATH", "npz:PATH", "python:MODULE:FUNCTION")


@section
class DataConfig:
    """Which images, and in what form.

    `root` is where named sets lie and where a relative PATH starts; `channels` turns grey into RGB or back;
    `image_size` crops the largest centred square and resizes it; `num_train` keeps a fixed stratified subset of the
    training split; `test_share` splits a set that has no test split of its own.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    channels: Literal[1, 3] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    num_train: Annotated[int, Field(ge=1)] | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2


def load_dataset(config: DataConfig, split: Split) -> ImageSet:
    """Load one split of the data set that `config` names, as uint8 [N, C, H, W] in memory.

    A sample keeps its id whatever `num_train`, `channels` and `image_size` say.
    DataError if the name is unknown, or the data is missing, damaged, or not as it must be.
    """
    if split not in get_args(Split):
        raise DataError(f"no split {split!r}: wanted 'train' or 'test'.")
    listing = _list(config, split)
    rows = _rows(listing, config, split)
    what = f"data set {listing.name}"
    pixels = with_size(with_channels(listing.read(rows), config.channels), config.image_size, what)
    return ImageSet(
        name=listing.name,
        split=split,
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(listing.labels[rows]),
        sample_ids=torch.from_numpy(listing.sample_ids[rows]),
        class_names=listing.class_names,
    )


def _list(config: DataConfig, split: Split) -> Listing:
    kind, colon, argument = config.name.partition(":")
    root = _path(config.root)
    if config.name == "digits":
        return list_digits()
    if config.name in TORCHVISION_NAMES:
        return list_torchvision(config.name, split, root=root, download=config.download)
    if colon and argument:
        match kind:
            case "imagefolder":
                folder = _path(argument, below=root)
                return list_image_folder(folder, split, channels=config.channels or 3, size=config.image_size)
            case "npz":
                return list_npz(_path(argument, below=root), split)
            case "python":
                return list_python(argument, split, root=root)
    raise UnknownDataError(_unknown(config.name))


def _rows(listing: Listing, config: DataConfig, split: Split) -> Rows:
    """Positions in the listing, ascending: the split's, and of those the `num_train` that were asked for."""
    rows = np.arange(len(listing.labels))
    if listing.whole:
        train, test = stratified_split(listing.labels, config.test_share)
        rows = train if split == "train" else test
    if split == "train" and config.num_train is not None:
        rows = rows[stratified_subset(listing.labels[rows], config.num_train)]
    return rows


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
