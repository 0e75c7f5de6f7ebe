"""Named data sets: torchvision's MNIST, FashionMNIST, CIFAR10 and CIFAR100, and scikit-learn's digits.

CIFAR's published files are pickles: torchvision opens them only if their md5 matches the published one.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.stages.data.sources.listing import Listing, list_arrays
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError, cause


def list_digits() -> Listing:
    """List scikit-learn's digits: 1,797 gray images of 8 x 8, ids in its order; levels 0..16 become 0..255.

    Source: UCI ML "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), its test part.
    """
    from sklearn.datasets import load_digits  # lazy: takes half a second

    digits = load_digits()
    levels = digits.images.astype(np.int64)
    images = ((levels * 255 + 8) // 16).astype(np.uint8)
    return list_arrays("digits", images, digits.target.astype(np.int64), unsplit=True)


def list_torchvision(name: str, split: Split, *, root: Path, download: bool) -> Listing:
    """List one published split of the set `name` in the folder `root`; ids are the positions in that split.

    Raises:
        DataError: The files cannot be read, nor downloaded if `download` is set.
    """
    try:
        published = _open(name, split, root)
    except Exception as error:  # torchvision can raise anything on damaged files
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
            "check the network and the disk and try again, or copy the files there and set "
            "data.download=false (data.root is the folder that holds them)."
        ) from error


def _download(name: str, root: Path) -> None:
    """Download into a temporary folder, then move each finished file to its place.

    A killed download so leaves no partial file under a final name, and concurrent jobs cannot mix their bytes.
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
    """Return the folder below its root that torchvision reads."""
    return getattr(_class(name), "base_folder", f"{name}/raw")


def _class(name: str) -> Any:
    from torchvision import datasets  # lazy: slower to import than torch itself

    return getattr(datasets, name)
