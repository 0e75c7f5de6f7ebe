"""`imagefolder:PATH`: one folder of images for each class, with or without split folders.

PATH/train/<class>/... and PATH/test/<class>/... (or val/, if there is no test/; `split_folders.py` has the other names
that are known); or PATH/<class>/..., to be split; or ImageNet-1k as it is published (`ilsvrc.py`). Unlabeled images
need no class folders for training.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.image_source import FilePaths
from kdpipe.stages.data.sources.ilsvrc import data_folder, flat_val, flat_val_files
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.sources.split_folders import LOOKED_FOR, Role, notices_of_splits, role_of, split_folders
from kdpipe.stages.data.sources.walk import SUFFIXES, LeftOut, walk_images
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError, first_few

T = TypeVar("T")


def list_image_folder(path: Path, split: Split, spec: DecodeSpec, *, unlabeled: bool = False) -> Listing:
    """List the images of one split, sorted by path, to be decoded to `spec`.

    A sample's id is a hash of its path below the split's folder; its class is that path's first folder. The train
    split defines the classes. Hidden names and files without an image suffix are left out, which the notices count.
    With `unlabeled` the images of the training split may lie in it without class folders: then a test split that has
    some defines the classes, if there is one.

    Raises:
        DataError: A folder is missing, empty or ambiguous, or a test class is not in train.
    """
    title, path = f"imagefolder:{path.name}", data_folder(path)
    try:
        if unlabeled and (found := _list_unlabeled(path, title, split, spec)):
            return found
        folders = {name: bool(role_of(name) and _subfolders(below)) for name, below in _subfolders(path).items()}
        chosen = split_folders(path, folders)
        class_names = _class_names(path / chosen.get("train", ""))
        flat = flat_val(class_names, folders) if set(chosen) == {"train"} else {}
        chosen |= flat
        split_folder = path / _split_folder(path, split, chosen, folders) if chosen else path
        left_out = LeftOut(str(split_folder))
        if flat and split == "test":
            files = flat_val_files(split_folder, class_names)
        else:
            files = _image_files(split_folder, class_names, left_out, may_be_empty=bool(chosen) and split == "test")
    except OSError as error:
        raise DataError(f"data set {title}: cannot list {error.filename}: {error.strerror}.") from error
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = [label_of[key.partition("/")[0]] for key in files]
    sample_ids = np.fromiter(map(sample_id, files), dtype=np.int64, count=len(files))
    splits = notices_of_splits(path, folders, chosen) if chosen and split == "train" else []
    return Listing(
        name=title,
        labels=np.array(labels, dtype=np.int64),
        sample_ids=sample_ids,
        class_names=class_names,
        images=ImageFileList(title, split_folder, FilePaths.pack(files.values()), sample_ids, spec),
        unsplit=not chosen,
        notices=tuple(filter(None, [*splits, str(left_out)])),
    )


def class_folders(path: Path) -> tuple[str, ...]:
    """Return the names of the classes, without looking for images. Raises DataError as `list_image_folder`."""
    path = data_folder(path)
    folders = {name: bool(role_of(name) and _subfolders(below)) for name, below in _subfolders(path).items()}
    return _class_names(path / split_folders(path, folders).get("train", ""))


def _list_unlabeled(path: Path, title: str, split: Split, spec: DecodeSpec) -> Listing | None:
    """List the images of a folder without class folders; None if there are some."""
    below = {role_of(name): folder for name, folder in _subfolders(path).items()}
    train, test = below.get("train", path), below.get("test") or below.get("val")
    if _subfolders(train):
        return None
    folder = test if split == "test" and test else train
    class_names = tuple(_subfolders(test)) if test else ()
    label_of, left_out = {class_name: label for label, class_name in enumerate(class_names)}, LeftOut(str(folder))
    if folder == test and class_names:
        files = _image_files(folder, class_names, left_out, may_be_empty=True)
    else:
        names = (name for found in walk_images(str(folder), left_out) for name in found.images)
        files = _by_nfc_name((name, str(folder / name)) for name in names)
    if not files:
        raise DataError(f"{folder.absolute()} has no images ({', '.join(sorted(SUFFIXES))}). {left_out}".rstrip())
    sample_ids = np.fromiter(map(sample_id, files), dtype=np.int64, count=len(files))
    return Listing(
        name=title,
        labels=np.array([label_of.get(key.partition("/")[0], UNLABELED) for key in files], dtype=np.int64),
        sample_ids=sample_ids,
        class_names=class_names,
        images=ImageFileList(title, folder, FilePaths.pack(files.values()), sample_ids, spec),
        unsplit=test is None,
        notices=tuple(filter(None, [str(left_out)])),
    )


def sample_id(key: str) -> int:
    """Return the first 63 bits of blake2b over the path below the split's folder, with forward slashes."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _subfolders(folder: Path) -> dict[str, Path]:
    """Return the subfolders by name, sorted; empty if `folder` does not exist."""
    if not folder.is_dir():
        return {}
    entries = (entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return _by_nfc_name((entry.name, Path(entry.path)) for entry in entries)


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder.absolute()}: imagefolder:PATH is relative to data.root unless absolute, and needs "
            "PATH/train/<class>/ and PATH/test/<class>/, or PATH/<class>/."
        )
    classes = _subfolders(folder)
    if not classes:
        raise DataError(
            f"{folder.absolute()} has no class folders: expected <class>/<image> in it; for images without "
            "labels, set data.labels = 'none'."
        )
    return tuple(classes)


def _split_folder(path: Path, split: Split, chosen: dict[Role, str], found: Iterable[str]) -> str:
    if split == "train":
        return chosen["train"]
    if (folder := chosen.get("test") or chosen.get("val")) is not None:
        return folder
    raise DataError(
        f"{path.absolute()} has the folders {', '.join(found)}: a train split, but no test split with class folders in "
        f"it. Looked for {LOOKED_FOR}: add test/<class>/, or use the train folder itself as PATH to split it by "
        "data.test_share."
    )


def _image_files(
    folder: Path, class_names: tuple[str, ...], left_out: LeftOut, *, may_be_empty: bool
) -> dict[str, str]:
    """Return the image files keyed and sorted by their path below `folder`, with forward slashes."""
    classes = _subfolders(folder)
    if unknown := [name for name in classes if name not in class_names]:
        raise DataError(
            f"{folder.absolute()} has the class folder {unknown[0]!r}, which is missing from the train split: "
            f"its classes are {first_few(class_names)}."
        )
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            left_out.add("hidden folders", entry.path) if entry.is_dir() else None
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122
            left_out.add("images in no class folder", entry.path)
    files: list[tuple[str, str]] = []
    for class_folder in classes.values():
        found = _class_files(class_folder, left_out, is_only=len(classes) == 1)
        if not found and not may_be_empty:
            raise DataError(
                f"{class_folder.absolute()} has no images ({', '.join(sorted(SUFFIXES))}): add some, or remove the "
                f"folder. {left_out}".rstrip()
            )
        files += [(path[len(str(folder)) + 1 :].replace(os.sep, "/"), path) for path in found]
    if not files:
        raise DataError(f"{folder.absolute()} has no images in its class folders. {left_out}".rstrip())
    return _by_nfc_name(files)


def _class_files(class_folder: Path, left_out: LeftOut, *, is_only: bool) -> list[str]:
    files: list[str] = []
    for number, found in enumerate(walk_images(str(class_folder), left_out)):
        if number == 0:
            _require_class(class_folder, found.folders, is_only=is_only and not found.images)
        # a million Path objects would cost seconds and a gigabyte
        files += [os.path.join(found.path, name) for name in found.images]  # noqa: PTH118
    return files


def _require_class(class_folder: Path, folders: list[str], *, is_only: bool) -> None:
    """Raise DataError if the folders in a class folder are splits, or those in the only one are the classes."""
    roles = {role_of(name) for name in folders}
    is_split, names = "train" in roles and len(roles - {None}) > 1, first_few(sorted(folders))
    if is_only and (is_split or len(folders) > 1):
        raise DataError(
            f"{class_folder.absolute()} would be the only class, and it holds the folders {names}: use it as "
            "PATH, if these are the splits or the classes."
        )
    if is_split:
        raise DataError(
            f"the class folder {class_folder.absolute()} holds the folders {names}: splits come first. Move the "
            "images to PATH/train/<class>/ and PATH/test/<class>/."
        )


def _by_nfc_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Key paths by their NFC name, sorted: macOS returns decomposed names, and ids must not depend on that."""
    paths: dict[str, T] = {}
    for name, path in named:
        twin = paths.setdefault(unicodedata.normalize("NFC", name), path)
        if twin != path:
            raise DataError(f"{twin} and {path} differ only in Unicode normalization: rename one.")
    return dict(sorted(paths.items()))
