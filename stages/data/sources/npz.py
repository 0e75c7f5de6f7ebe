"""`npz:PATH`: a folder with train.npz and test.npz, or one .npz file to split. Nothing is unpickled.

Each file holds `images` uint8 [N, H, W] or [N, H, W, C] and `labels` integer [N]; `ids` integer [N] and `classes`, the
class names [num_classes], are optional. One file may also hold both splits, as MedMNIST's (train_images, train_labels,
test_images, ...) and Keras' (x_train, y_train, x_test, y_test) do.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.sources.listing import (
    Listing,
    integer_column,
    list_arrays,
    numbered_classes,
    numbers,
    target_rows,
)
from kdpipe.stages.data.splits import Split
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import DataError, cause

Arrays = dict[str, npt.NDArray[Any]]


def list_npz(path: Path, split: Split, task: Task = CLASSIFICATION) -> Listing:
    """List one split of the folder `path`, or all of the file `path`; the train split defines the classes.

    With another task than classification `labels` are [N, K], and `classes` the names of the K.

    Raises:
        DataError: A file or array is missing, damaged, of a wrong type or shape, or holds objects.
    """
    name = f"npz:{path.name}"
    unsplit = not path.is_dir()
    file = path if unsplit else path / f"{split}.npz"
    if unsplit and path.is_file() and (splits := _splits(path)):
        return _list_split(path, split, splits, task)
    arrays = read_npz(file, required=("images", "labels"), optional=("ids", "classes"))
    if unsplit or split == "train":
        class_names = _class_names(name, arrays, task)
    else:
        train = read_npz(path / "train.npz", required=("labels",), optional=("classes",))
        class_names = _class_names(name, train, task)
    columns = arrays["images"], arrays["labels"], arrays.get("ids")
    return list_arrays(name, *columns, class_names=class_names, unsplit=unsplit, task=task)


_SPLIT_KEYS = {"{}_images": "{}_labels", "x_{}": "y_{}"}
"""The names of the images and labels of a split in one file: MedMNIST's and Keras'."""


def _splits(path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of images and labels by split; empty if the file holds no training split of its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # a damaged zip can raise anything; reading it says why
        return {}
    keys = [
        (split, images.format(split), labels.format(split))
        for images, labels in _SPLIT_KEYS.items()
        for split in ("train", "val", "test")
    ]
    splits = {split: (images, labels) for split, images, labels in keys if {images, labels} <= found}
    return splits if "train" in splits and "images" not in found else {}


def _list_split(path: Path, split: Split, splits: dict[str, tuple[str, str]], task: Task) -> Listing:
    """List a split of a file that holds several; without a test split, val is it."""
    name, unsplit = f"npz:{path.name}", len(splits) == 1
    test = "test" if "test" in splits else "val"
    images, labels = splits["train" if split == "train" or unsplit else test]
    arrays = read_npz(path, required=(images, labels, splits["train"][1]), optional=("classes",))
    taken = f"{splits['train'][0]} is the training split, {splits[test][0]} the test split" if not unsplit else ""
    unused = f", {splits['val'][0]} is not used" if len(splits) == 3 else ""
    notices = (f"{path.name}: {taken}{unused}.",) if taken and split == "train" else ()
    class_names = _class_names(name, {**arrays, "labels": arrays[splits["train"][1]]}, task)
    columns = arrays[images], arrays[labels]
    return list_arrays(name, *columns, class_names=class_names, unsplit=unsplit, notices=notices, task=task)


def _class_names(name: str, arrays: Arrays, task: Task) -> tuple[str, ...]:
    if "classes" not in arrays and task != CLASSIFICATION:
        return numbers(target_rows(name, task, arrays["labels"]).shape[1])
    if "classes" not in arrays:
        return numbered_classes(name, integer_column(name, "labels", arrays["labels"]))
    classes = arrays["classes"]
    if classes.dtype.kind != "U" or classes.ndim != 1 or not len(classes):
        raise DataError(
            f"data set {name}: classes must be strings [num_classes], found {classes.dtype} {list(classes.shape)}."
        )
    return tuple(str(class_name) for class_name in classes)


def read_npz(path: Path, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Arrays:
    """Read the `required` arrays and those `optional` ones that exist; nothing is unpickled.

    Raises:
        DataError: A file or array is missing, damaged, or holds anything but numbers and strings.
    """
    if not path.is_file():
        raise DataError(
            f"no file {path.absolute()}: npz:PATH is relative to data.root unless absolute, and is "
            "a folder with train.npz and test.npz, or one .npz file."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return {key: _member(archive, key) for key in _present(archive, required, optional)}
    except DataError:
        raise
    except Exception as error:  # a damaged or hostile zip can raise anything
        raise DataError(f"{path} cannot be read as .npz ({cause(error)}): recreate it with numpy.savez.") from error


def _present(archive: zipfile.ZipFile, required: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    found = sorted(name.removesuffix(".npy") for name in archive.namelist())
    if missing := [key for key in required if key not in found]:
        raise DataError(f"{archive.filename} has no array {missing[0]!r}: found {', '.join(found) or 'none'}.")
    return [key for key in (*required, *optional) if key in found]


def _member(archive: zipfile.ZipFile, key: str) -> npt.NDArray[Any]:
    """Read one array after checking its header against its byte count: an absurd shape must not reserve memory."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as file:
        shape, dtype = _header(file)
        where = f"{archive.filename}, array {key!r}"
        if dtype.kind not in "iuUfb" or not dtype.itemsize:
            raise DataError(f"{where}: expected numbers or strings, found {dtype}: objects are never unpickled.")
        stored_bytes, expected_bytes = info.file_size - file.tell(), math.prod(shape) * dtype.itemsize
        if stored_bytes != expected_bytes:
            raise DataError(
                f"{where}: {dtype} {list(shape)} takes {expected_bytes} bytes, but {stored_bytes} are stored."
            )
        file.seek(0)
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"unknown .npy version {version}")
    shape, _, dtype = readers[version](file)
    return shape, dtype
