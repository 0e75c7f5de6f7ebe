"""Map-style torch Datasets of (image, label), in memory, or read on access if they are large or of unequal sizes.

Images are to be raw: PIL images, uint8 arrays or tensors, or what ToTensor makes of them, which is converted back
exactly. Augmentation and normalization are kdpipe's: a student must see the very pixels that the teacher saw.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kdpipe.stages.data.decode import Pixels, new_pixels, with_channels, with_size
from kdpipe.stages.data.image_files import ImageFileList, ImageFiles
from kdpipe.stages.data.image_set import UNLABELED, ImageSet
from kdpipe.stages.data.loader.survey import survey
from kdpipe.stages.data.sources.listing import (
    Listing,
    absent_classes,
    has_target,
    integer_column,
    numbered_classes,
    numbers,
    other_tasks,
    refuse_shifted,
    target_rows,
    unlabeled_samples,
)
from kdpipe.stages.data.splits import Indices, Split
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import DataError, cause
from kdpipe.store.errors import KdpipeError

MAX_BYTES = 8 * 2**30
"""Default limit for the pixels of one data set in memory."""

NUM_READ_TWICE = 64
"""Samples read twice: a transform that changes one reading in ten escapes once in 700,000."""

_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()

RAW = (
    "hand raw images (PIL images or uint8 [C, H, W]); augmentation is a matter of kdpipe's views, normalization of a "
    "model's mean and std"
)


def is_torch_dataset(found: Any) -> bool:
    """Return whether an object can be read as a data set by index, and is no plain collection."""
    plain = isinstance(found, tuple | list | Mapping | np.ndarray | Tensor | str)
    return not plain and hasattr(found, "__getitem__") and hasattr(found, "__len__")


def image_set_from_dataset(dataset: Any, *, name: str, split: Split, **options: Any) -> ImageSet:
    """Read a map-style torch Dataset of (image, label). Options and errors: `list_torch_dataset`."""
    listing = list_torch_dataset(dataset, name, **options)
    images = listing.images
    assert not isinstance(images, ImageFileList)
    if split == "train" and options.get("class_names") is None and listing.targets is None:
        refuse_shifted(name, listing.labels, listing.class_names)
    notices = absent_classes(name, split, listing.labels, listing.class_names, None, targets=listing.targets)
    notices += unlabeled_samples(name, split, listing.labels)
    for notice in () if _was_warned(dataset) else notices:
        warnings.warn(notice, stacklevel=2)
    return ImageSet(
        name,
        split,
        images if isinstance(images, ImageFiles) else torch.from_numpy(images(np.arange(len(listing.labels)))),
        torch.from_numpy(listing.labels),
        torch.from_numpy(listing.sample_ids),
        listing.class_names,
        task=options.get("task", CLASSIFICATION),
        targets=None if listing.targets is None else torch.from_numpy(listing.targets),
    )


def list_torch_dataset(
    dataset: Any,
    name: str,
    *,
    class_names: Sequence[str] | None = None,
    sample_ids: Sequence[int] | npt.NDArray[np.int64] | Tensor | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    max_bytes: int = MAX_BYTES,
    num_workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
    task: Task = CLASSIFICATION,
) -> Listing:
    """Read the images and labels of a map-style torch Dataset.

    Images that take more than `max_bytes`, or are of unequal sizes, stay in the Dataset and are read on access.

    Args:
        dataset: Returns (image, label) for an index, or a dictionary with one image and one integer.
        name: The data set's name, part of its identity.
        class_names: Defaults to `dataset.classes`, or "0", "1", ... up to the largest label, or the last of the K.
        sample_ids: Defaults to the positions; of a Subset, to those in the whole set.
        image_size: Crop the largest centered square and resize it to this many pixels.
        channels: 1 or 3: convert to gray or RGB; by default images stay as the first is.
        max_bytes: Limit for the pixels in memory.
        num_workers: Processes that read it once where it is not kept in memory; None means one for each core.
        on_image: Called with (done, total) from time to time meanwhile; may raise to abort.
        task: With another than classification the label is a number or [K] numbers: an array, a tensor or a list.

    Raises:
        DataError: The data set cannot be read by index, is empty or random, or a sample is no raw image with an
            integer label, or has another number of channels than the first.
    """
    num_samples = _num_samples(dataset, name)
    read = _Reader(dataset, f"data set {name}", image_size, channels, task)
    read.require_deterministic(num_samples)
    images: ImageFiles | Callable[[Indices], Pixels]
    if (found := _read_all(read, num_samples, max_bytes)) is not None:
        images, labels = _rows_of(found[0]), found[1]
    else:
        images, labels = survey(read, read.where, num_samples, num_workers=num_workers, on_image=on_image)
    ids = _positions(dataset, num_samples) if sample_ids is None else np.asarray(sample_ids)
    names = _classes(dataset, name) if class_names is None else tuple(map(str, class_names))
    targets = None if task == CLASSIFICATION else target_rows(name, task, labels, names)
    if names is None:
        names = numbered_classes(name, labels) if targets is None else numbers(targets.shape[1])
    return Listing(
        name=name,
        labels=labels if targets is None else has_target(targets),
        sample_ids=integer_column(name, "ids", ids, num_samples),
        class_names=names,
        images=images,
        targets=targets,
    )


def _read_all(read: _Reader, num_samples: int, max_bytes: int) -> tuple[Pixels, npt.NDArray[Any]] | None:
    """Return the pixels, uint8 [N, C, H, W], and labels of all samples; None if they do not fit or are unequal."""
    shape = read(0)[0].shape
    if num_samples * int(np.prod(shape)) > max_bytes:
        return None
    pixels = new_pixels((num_samples, *shape), read.where)
    labels = []
    for index in range(num_samples):
        image, label = read(index)
        labels.append(label)
        if image.shape != shape:
            return None
        pixels[index] = image
    return pixels, np.array(labels)


def _rows_of(pixels: Pixels) -> Callable[[Indices], Pixels]:
    """Return a function that returns some rows, or the array itself, not a copy, for all of them in order."""
    everything = np.arange(len(pixels))
    return lambda indices: pixels if np.array_equal(indices, everything) else pixels[indices]


class _Reader:
    """Reads samples of a data set as pixels uint8 [C, H, W] and a label, or targets float32 [K]."""

    def __init__(self, dataset: Any, where: str, image_size: int | None, channels: int | None, task: Task) -> None:
        self.dataset, self.where, self.image_size, self.channels = dataset, where, image_size, channels
        self.task = task
        self.num_targets: int | None = None

    def __call__(self, index: int) -> tuple[Pixels, Any]:
        try:
            sample = self.dataset[index]
        except KdpipeError:
            raise
        except (Exception, SystemExit) as error:  # other people's code
            raise DataError(f"{self.where}: sample {index} cannot be read ({cause(error)}).") from error
        where = f"{self.where}, sample {index}"
        image, label = _image_and_label(sample, where, self.task)
        pixels = with_channels(_pixels(image, where)[None], self.channels)
        found = _label(label, where) if self.task == CLASSIFICATION else self._targets(label, where)
        return with_size(pixels, self.image_size, self.where)[0], found

    def _targets(self, label: Any, where: str) -> npt.NDArray[Any]:
        try:
            column = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
            found = np.atleast_1d(column).astype(np.float32)
        except (TypeError, ValueError):
            column = np.asarray(None)
        wanted = self.num_targets or "K"
        if column.dtype.kind not in "iufb" or found.ndim != 1 or self.num_targets not in (None, len(found)):
            raise DataError(
                f"{where}: with data.task = {self.task!r} the label must be numbers [{wanted}], NaN where not known, "
                f"found {type(label).__name__} {label!r:.60}."
            )
        self.num_targets = len(found)
        return found

    def require_deterministic(self, num_samples: int) -> None:
        """Raise DataError if samples differ when they are read again."""
        for number in range(NUM_READ_TWICE):
            index = number * num_samples // NUM_READ_TWICE
            (first, label), (second, other) = self(index), self(index)
            same = np.array_equal(label, other, equal_nan=True)
            if not same or not np.array_equal(first, second):
                raise DataError(
                    f"{self.where}: sample {index} differs when it is read again, so its transform is random: remove "
                    "it, and pass the operations as views."
                )


def _num_samples(dataset: Any, name: str) -> int:
    try:
        num_samples = len(dataset)
        readable = hasattr(dataset, "__getitem__")
    except (TypeError, NotImplementedError):
        readable = False
    if not readable:
        raise DataError(
            f"data set {name}: {type(dataset).__name__} cannot be read by index, which caching needs: pass a map-style "
            "data set, with __len__ and __getitem__."
        )
    if num_samples == 0:
        raise DataError(f"data set {name} has no samples: at least one is required.")
    return num_samples


def _image_and_label(sample: Any, where: str, task: Task) -> tuple[Any, Any]:
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    if isinstance(sample, Mapping):
        images = [value for value in sample.values() if isinstance(value, Image.Image) or getattr(value, "ndim", 0) > 1]
        some = (int, np.integer) if task == CLASSIFICATION else (int, float, list, np.number)
        labels = [value for value in sample.values() if isinstance(value, some) or getattr(value, "ndim", 0) == 1]
        if len(images) == len(labels) == 1:
            return images[0], labels[0]
    parts = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, tuple | list) else ()
    types = ", ".join(type(part).__name__ for part in parts)
    raise DataError(
        f"{where}: found {type(sample).__name__}{types and f' of {types}'}, wanted (image, label): wrap the data set "
        "in one that returns these two."
    )


def _label(label: Any, where: str) -> int:
    if label is None:
        return UNLABELED
    column = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    if column.dtype.kind not in "iub" or column.size != 1:
        found = f"{column.dtype} {list(column.shape)}" if column.ndim else f"{type(label).__name__} {label!r:.40}"
        advice = "; of a one-hot row, its argmax" if column.size > 1 and column.dtype != object else ""
        raise DataError(f"{where}: the label must be one integer{advice}, found {found}.{other_tasks()}")
    return int(column.reshape(()))


def _pixels(image: Any, where: str) -> Pixels:
    """Convert an image to uint8 [C, H, W], C 1 or 3."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{where}: a PIL image of mode {image.mode} has more than 8 bits a channel: convert it.")
        array = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    elif isinstance(image, Tensor):
        array = _channels_last(_as_uint8(image.detach().cpu().as_subclass(Tensor).numpy(), where))
    elif isinstance(image, np.ndarray):
        array = _as_uint8(image, where)
    else:
        raise DataError(f"{where}: the image is of type {type(image).__name__}: {RAW}.")
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        wanted = "[C, H, W]" if isinstance(image, Tensor) else "[H, W, C]"
        shape = list(getattr(image, "shape", array.shape))
        raise DataError(f"{where}: the image is {type(image).__name__} {shape}, wanted {wanted}, C 1 or 3, or [H, W].")
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _channels_last(pixels: Pixels) -> Pixels:
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels


def _as_uint8(array: npt.NDArray[Any], where: str) -> Pixels:
    """Return uint8 as it is, and floats k / 255 as k."""
    if array.dtype == np.uint8:
        return array
    if array.dtype not in (np.float32, np.float64) or not array.size:
        raise DataError(f"{where}: the image is {array.dtype}: {RAW}.")
    levels = array.astype(np.float64) * 255
    rounded = np.rint(levels)
    tolerance = 510 * np.finfo(array.dtype).eps  # two roundings of numbers up to 255
    if not (np.abs(levels - rounded) <= tolerance).all() or rounded.min() < 0 or rounded.max() > 255:  # NaN: never <=
        low, high = float(array.min()), float(array.max())
        what = "numbers that are no multiples of 1/255" if 0 <= low <= high <= 1 else "numbers"
        raise DataError(f"{where}: the image holds {array.dtype} {what}, from {low:.4g} to {high:.4g}: {RAW}.")
    return rounded.astype(np.uint8)


def _positions(dataset: Any, num_samples: int) -> npt.NDArray[np.int64]:
    """Return the positions of the samples in the whole set, of which a torch Subset is a part; an ImageSet's ids."""
    if isinstance(dataset, ImageSet):
        return dataset.sample_ids.numpy()
    if isinstance(dataset, torch.utils.data.Subset):
        indices: npt.NDArray[np.int64] = np.asarray(dataset.indices, dtype=np.int64)
        return _positions(dataset.dataset, len(dataset.dataset)).take(indices)  # type: ignore[arg-type]
    return np.arange(num_samples, dtype=np.int64)


def _classes(dataset: Any, name: str) -> tuple[str, ...] | None:
    """Return the names of the classes that a data set, or the parts that it consists of, has."""
    found = getattr(dataset, "classes", None)
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if isinstance(found, list | tuple) and all(isinstance(each, str | int) for each in found):
        return tuple(map(str, found))
    if isinstance(dataset, torch.utils.data.Subset):
        return _classes(dataset.dataset, name)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = {_classes(part, name) for part in dataset.datasets}
        if len(parts) > 1:
            raise DataError(
                f"data set {name}: its parts have different classes: give class_names for all of them "
                f"{_in_python('class_names=[...]')}."
            )
        return parts.pop()
    return None


def _was_warned(dataset: Any) -> bool:
    """Return whether this was asked before of the same object, which one script hands to several stages."""
    try:
        found = dataset in _WARNED
        _WARNED.add(dataset)
    except TypeError:  # it cannot be hashed
        return False
    return found


def _in_python(argument: str) -> str:
    return f"(in Python: kdpipe.as_image_set(dataset, {argument}))"
