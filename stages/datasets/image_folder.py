"""`imagefolder:PATH`: a folder of photographs, one folder a class, with or without folders for the splits.

PATH/train/<class>/... and PATH/test/<class>/... (or val/, if there is no test/); or PATH/<class>/..., to be split.
"""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from stages.datasets.listing import Listing
from stages.datasets.pixels import Pixels, decode_image, new_pixels
from stages.datasets.split import Rows, Split
from stages.errors import DataError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_MAX_THREADS = 16


def list_image_folder(path: Path, split: Split, *, channels: int, size: int | None) -> Listing:
    """List the images of one split, in the order of their paths; they are decoded as `decode_image` says.

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
    return Listing(
        name=name,
        labels=np.array(labels, dtype=np.int64),
        sample_ids=_sample_ids(list(files)),
        class_names=class_names,
        read=functools.partial(_read, name, list(files.values()), channels, size),
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


def _image_files(folder: Path, class_names: tuple[str, ...]) -> dict[str, Path]:
    """Image files by their key, the path below `folder` with forward slashes, sorted by it."""
    classes = _subfolders(folder)
    if unknown := [name for name in classes if name not in class_names]:
        raise DataError(
            f"{folder.absolute()} has the class folder {unknown[0]!r}, which the train split lacks: "
            f"its classes are {_few(class_names)}."
        )
    files: list[Path] = []
    for class_folder in classes.values():
        found = list(_walk(class_folder))
        if not found:
            raise DataError(f"{class_folder.absolute()} has no images ({_few(sorted(SUFFIXES), 9)}).")
        files += found
    return _by_spelling((file.relative_to(folder).as_posix(), file) for file in files)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent) / name


def _raise(error: OSError) -> NoReturn:
    raise error


def _by_spelling(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Paths by their composed (NFC) name, sorted: macOS hands out decomposed ones, and ids must not depend on it."""
    paths: dict[str, Path] = {}
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


def _read(name: str, files: list[Path], channels: int, size: int | None, rows: Rows) -> Pixels:
    """Decode the files at `rows` [M] to uint8 [M, C, H, W]; the threads change no bit of it."""
    chosen = [files[row] for row in rows]
    with _strict_pillow(), ThreadPoolExecutor(_num_threads()) as pool:
        first = decode_image(chosen[0], channels, size)
        pixels = new_pixels((len(chosen), *first.shape), f"data set {name}")

        def place(at: int) -> None:
            image = decode_image(chosen[at], channels, size)
            if image.shape != first.shape:
                raise DataError(_unequal(chosen[0], first, chosen[at], image))
            pixels[at] = image

        for _ in pool.map(place, range(len(chosen))):
            pass
    return pixels


@contextmanager
def _strict_pillow() -> Iterator[None]:
    # Set once, outside the threads: warning filters belong to the whole process.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _num_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_THREADS)


def _unequal(path: Path, image: Pixels, other_path: Path, other: Pixels) -> str:
    return (
        f"the images are of unequal size: {path} is {image.shape[2]} x {image.shape[1]}, "
        f"{other_path} is {other.shape[2]} x {other.shape[1]}: set data.image_size to crop and resize them."
    )


def _few(names: tuple[str, ...] | list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
