"""`imagefolder:PATH`: a folder of photographs, one folder a class, with or without folders for the splits.

PATH/train/<class>/... and PATH/test/<class>/... (or val/, if there is no test/); or PATH/<class>/..., to be split.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from stages.datasets.listing import Listing
from stages.datasets.paths import Paths
from stages.datasets.photographs import Photographs
from stages.datasets.pixels import Form
from stages.datasets.split import Rows, Split
from stages.errors import DataError

T = TypeVar("T")

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def list_image_folder(path: Path, split: Split, form: Form) -> Listing:
    """List the images of one split, in the order of their paths; they are to be decoded to `form`.

    A sample's id is a hash of its path below the split's folder, its class that path's first folder; classes are
    the train split's. Names that start with a dot, and files without an image's SUFFIXES, are passed over.
    DataError if a folder is missing or empty, a test class is unknown to train, or two samples get one id.
    """
    name = f"imagefolder:{path.name}"
    try:
        whole = not any(_subfolders(path / part) for part in ("train", "test", "val"))
        class_names = _class_names(path if whole else path / "train")
        split_folder = path if whole else _split_folder(path, split)
        files = _image_files(split_folder, class_names)
    except OSError as error:
        raise DataError(f"data set {name}: cannot list {error.filename}: {error.strerror}.") from error
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = [label_of[key.partition("/")[0]] for key in files]
    sample_ids = _sample_ids(list(files))
    return Listing(
        name=name,
        labels=np.array(labels, dtype=np.int64),
        sample_ids=sample_ids,
        class_names=class_names,
        images=Photographs(name, split_folder, Paths.of(files.values()), sample_ids, form),
        whole=whole,
    )


def sample_id(key: str) -> int:
    """The first 63 bits of blake2b over the path below the split's folder, with forward slashes."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _subfolders(folder: Path) -> dict[str, Path]:
    """The folders in it by name, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    found = _by_spelling((entry.name, entry) for entry in folder.iterdir() if entry.is_dir())
    return {name: entry for name, entry in found.items() if not name.startswith(".")}


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder.absolute()}: imagefolder:PATH is looked for below data.root unless it is absolute, "
            "and needs PATH/train/<class>/ and PATH/test/<class>/, or PATH/<class>/."
        )
    class_names = tuple(_subfolders(folder))
    if not class_names:
        raise DataError(f"{folder.absolute()} has no class folders: wanted <class>/<image> in it.")
    return class_names


def _split_folder(path: Path, split: Split) -> Path:
    candidates = ["train"] if split == "train" else ["test", "val"]
    for candidate in candidates:
        if _subfolders(path / candidate):
            return path / candidate
    raise DataError(
        f"{path.absolute()} has a train folder, but neither test/<class>/ nor val/<class>/: add one, "
        "or name the train folder itself to have it split by data.test_share."
    )


def _image_files(folder: Path, class_names: tuple[str, ...]) -> dict[str, str]:
    """Image files by their key, the path below `folder` with forward slashes, sorted by it."""
    classes = _subfolders(folder)
    if unknown := [name for name in classes if name not in class_names]:
        raise DataError(
            f"{folder.absolute()} has the class folder {unknown[0]!r}, which the train split lacks: "
            f"its classes are {_few(class_names)}."
        )
    files: list[tuple[str, str]] = []
    for class_folder in classes.values():
        found = [(_key(path, folder), path) for path in _walk(class_folder)]
        if not found:
            raise DataError(f"{class_folder.absolute()} has no images ({_few(sorted(SUFFIXES), 9)}).")
        files += found
    return _by_spelling(files)


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122
                yield os.path.join(parent, name)  # noqa: PTH118 - a million Path objects cost seconds and a gigabyte


def _key(path: str, folder: Path) -> str:
    """The path below `folder`, with forward slashes."""
    return path[len(str(folder)) + 1 :].replace(os.sep, "/")


def _raise(error: OSError) -> NoReturn:
    raise error


def _by_spelling(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Paths by their composed (NFC) name, sorted: macOS hands out decomposed ones, and ids must not depend on it."""
    paths: dict[str, T] = {}
    for name, path in named:
        twin = paths.setdefault(unicodedata.normalize("NFC", name), path)
        if twin != path:
            raise DataError(f"{twin} and {path} differ only in how Unicode spells them: rename one.")
    return dict(sorted(paths.items()))


def _sample_ids(keys: list[str]) -> Rows:
    key_of: dict[int, str] = {}
    for key in keys:
        twin = key_of.setdefault(sample_id(key), key)
        if twin != key:
            raise DataError(f"the paths {twin} and {key} hash to the same sample id: rename one.")
    return np.fromiter(key_of, dtype=np.int64, count=len(key_of))


def _few(names: tuple[str, ...] | list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
