"""`imagefolder:PATH`: one folder of images for each class, with or without split folders.

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

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList, pack_paths
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError

T = TypeVar("T")

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def list_image_folder(path: Path, split: Split, spec: DecodeSpec) -> Listing:
    """List the images of one split, sorted by path, to be decoded to `spec`.

    A sample's id is a hash of its path below the split's folder; its class is that path's first folder. The train
    split defines the classes. Names that start with a dot and files without an image suffix are skipped.

    Raises:
        DataError: A folder is missing or empty, or a test class is not in train.
    """
    name = f"imagefolder:{path.name}"
    try:
        unsplit = not any(_subfolders(path / part) for part in ("train", "test", "val"))
        class_names = _class_names(path if unsplit else path / "train")
        split_folder = path if unsplit else _split_folder(path, split)
        files = _image_files(split_folder, class_names)
    except OSError as error:
        raise DataError(f"data set {name}: cannot list {error.filename}: {error.strerror}.") from error
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = [label_of[key.partition("/")[0]] for key in files]
    sample_ids = np.fromiter(map(sample_id, files), dtype=np.int64, count=len(files))
    return Listing(
        name=name,
        labels=np.array(labels, dtype=np.int64),
        sample_ids=sample_ids,
        class_names=class_names,
        images=ImageFileList(name, split_folder, pack_paths(files.values()), sample_ids, spec),
        unsplit=unsplit,
    )


def sample_id(key: str) -> int:
    """Return the first 63 bits of blake2b over the path below the split's folder, with forward slashes."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _subfolders(folder: Path) -> dict[str, Path]:
    """Return the subfolders by name, sorted; empty if `folder` does not exist."""
    if not folder.is_dir():
        return {}
    found = _by_nfc_name((entry.name, entry) for entry in folder.iterdir() if entry.is_dir())
    return {name: entry for name, entry in found.items() if not name.startswith(".")}


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder.absolute()}: imagefolder:PATH is relative to data.root unless absolute, and needs "
            "PATH/train/<class>/ and PATH/test/<class>/, or PATH/<class>/."
        )
    class_names = tuple(_subfolders(folder))
    if not class_names:
        raise DataError(f"{folder.absolute()} has no class folders: expected <class>/<image> in it.")
    return class_names


def _split_folder(path: Path, split: Split) -> Path:
    candidates = ["train"] if split == "train" else ["test", "val"]
    for candidate in candidates:
        if _subfolders(path / candidate):
            return path / candidate
    raise DataError(
        f"{path.absolute()} has a train folder, but neither test/<class>/ nor val/<class>/: add one, "
        "or use the train folder itself as PATH to split it by data.test_share."
    )


def _image_files(folder: Path, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return the image files keyed and sorted by their path below `folder`, with forward slashes."""
    classes = _subfolders(folder)
    if unknown := [name for name in classes if name not in class_names]:
        raise DataError(
            f"{folder.absolute()} has the class folder {unknown[0]!r}, which is missing from the train split: "
            f"its classes are {_few(class_names)}."
        )
    files: list[tuple[str, str]] = []
    for class_folder in classes.values():
        found = [(path[len(str(folder)) + 1 :].replace(os.sep, "/"), path) for path in _list_files(class_folder)]
        if not found:
            raise DataError(f"{class_folder.absolute()} has no images ({_few(sorted(SUFFIXES), 9)}).")
        files += found
    return _by_nfc_name(files)


def _list_files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122
                yield os.path.join(parent, name)  # noqa: PTH118 - a million Path objects cost seconds and a gigabyte


def _raise(error: OSError) -> NoReturn:
    raise error


def _by_nfc_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Key paths by their NFC name, sorted: macOS returns decomposed names, and ids must not depend on that."""
    paths: dict[str, T] = {}
    for name, path in named:
        twin = paths.setdefault(unicodedata.normalize("NFC", name), path)
        if twin != path:
            raise DataError(f"{twin} and {path} differ only in Unicode normalization: rename one.")
    return dict(sorted(paths.items()))


def _few(names: tuple[str, ...] | list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
