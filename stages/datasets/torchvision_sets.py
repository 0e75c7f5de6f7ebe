"""The data sets that torchvision reads and downloads: MNIST, FashionMNIST, CIFAR10, CIFAR100.

CIFAR's published files are pickles: torchvision opens them only if their md5 is the published one.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from stages.datasets.listing import Listing, list_arrays
from stages.datasets.split import Split
from stages.errors import DataError, cause

NAMES = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")


def list_torchvision(name: str, split: Split, *, root: Path, download: bool) -> Listing:
    """One published split of the set `name`, from the folder `root`; ids are the positions in that split.

    What cannot be read is downloaded if `download`. DataError, naming the folder, if that does not help either.
    """
    try:
        published = _open(name, split, root)
    except Exception as error:  # torchvision raises whatever the first wrong byte leads to
        if not download:
            raise DataError(
                f"{name} cannot be read from {root.absolute() / _folder(name)} ({cause(error)}): "
                f"data.root must be the folder that holds {_folder(name)}, or set data.download=true."
            ) from error
        published = _download_and_open(name, split, root)
    return list_arrays(name, published.data, np.asarray(published.targets), class_names=tuple(published.classes))


def _open(name: str, split: Split, root: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):  # CIFAR's pickles are older than today's numpy
        return _class(name)(str(root), train=split == "train", download=False)


def _download_and_open(name: str, split: Split, root: Path) -> Any:
    try:
        _download(name, root)
        return _open(name, split, root)
    except Exception as error:
        raise DataError(
            f"{name} is not in {root.absolute() / _folder(name)} and cannot be downloaded ({cause(error)}): "
            "check the network and the disk and try again, or bring the files there by hand and set "
            "data.download=false (data.root says where they are looked for)."
        ) from error


def _download(name: str, root: Path) -> None:
    """Download into a folder of our own, then move each finished file to its place.

    So a killed download leaves nothing half done under a final name, and two jobs at once cannot mix their bytes.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True) as scratch:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _class(name)(scratch, download=True)
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file():
                place = root / file.relative_to(scratch)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)


def _folder(name: str) -> str:
    """Where torchvision looks for the files, under its root."""
    return getattr(_class(name), "base_folder", f"{name}/raw")


def _class(name: str) -> Any:
    from torchvision import datasets  # it takes longer to import than torch itself: only its users pay

    return getattr(datasets, name)
