"""One split of a data set, whole in memory: its images, labels and ids, and how a store recognises it again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.errors import DataError
from store import ids_and_labels_sha256

STD_FLOOR = 1 / 255
"""Below one grey level there is nothing to normalise; dividing by less would only blow up rounding errors."""

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split.

    `images` uint8 [N, C, H, W] with C 1 (grey) or 3 (RGB); `labels` int64 [N], each within [0, num_classes);
    `sample_ids` int64 [N], unique within the split, >= 0, the same on every machine. Anything else is a DataError.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_layout(self)
        _check_ids(self)
        _check_labels(self)

    @property
    def num_samples(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return self.images.shape[2], self.images.shape[3]


def digest(image_set: ImageSet) -> dict[str, Any]:
    """Say in JSON which samples these are: name, split, counts, and a sha256 over the ids and labels.

    The order of the samples does not count: everything finds them by id.
    """
    return {
        "name": image_set.name,
        "split": image_set.split,
        "num_samples": image_set.num_samples,
        "num_classes": image_set.num_classes,
        "ids_and_labels_sha256": ids_and_labels_sha256(image_set.sample_ids.numpy(), image_set.labels.numpy()),
    }


def pixel_checksums(image_set: ImageSet) -> npt.NDArray[np.uint32]:
    """The crc32c of each sample's pixels (its [C, H, W] bytes, row by row), uint32 [N]."""
    images = image_set.images.cpu().numpy()
    checksums = (google_crc32c.value(image.tobytes()) for image in images)
    return np.fromiter(checksums, dtype=np.uint32, count=len(images))


def normalisation(image_set: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the whole set, in [0, 1] units, rounded to 4 digits.

    Taken from counts of the 256 grey levels: exact integers, so neither the order nor the threads change a bit.
    """
    moments = [_moments(image_set.images[:, channel]) for channel in range(image_set.in_channels)]
    return tuple(mean for mean, _ in moments), tuple(std for _, std in moments)


def _moments(channel: Tensor) -> tuple[float, float]:
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in torch.split(channel, _CHUNK):
        counts += torch.bincount(chunk.reshape(-1), minlength=256).cpu()
    levels = [(level, int(count)) for level, count in enumerate(counts)]
    total = sum(count for _, count in levels)
    first = sum(level * count for level, count in levels)
    second = sum(level * level * count for level, count in levels)
    std = math.sqrt(second * total - first * first) / (255 * total)
    return round(first / (255 * total), 4), round(max(std, STD_FLOOR), 4)


def _check_layout(image_set: ImageSet) -> None:
    where = _where(image_set)
    images, shape = image_set.images, tuple(image_set.images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
        raise DataError(
            f"{where}: images must be uint8 [N, C, H, W] with C 1 or 3, found {images.dtype} {list(shape)}."
        )
    if shape[0] == 0:
        raise DataError(f"{where} has no sample: wanted at least one.")
    for what, column in (("labels", image_set.labels), ("sample_ids", image_set.sample_ids)):
        if column.dtype != torch.int64 or column.shape != shape[:1]:
            raise DataError(
                f"{where}: {what} must be int64 [{shape[0]}], one for each image, "
                f"found {column.dtype} {list(column.shape)}."
            )


def _check_ids(image_set: ImageSet) -> None:
    ids = image_set.sample_ids
    negative = (ids < 0).nonzero()
    if len(negative):
        at = int(negative[0])
        raise DataError(
            f"{_where(image_set)}: the sample at position {at} has the id {int(ids[at])}: ids must be >= 0."
        )
    ordered, order = ids.sort(stable=True)
    twins = (ordered[1:] == ordered[:-1]).nonzero()
    if len(twins):
        at = int(twins[0])
        raise DataError(
            f"{_where(image_set)}: the samples at positions {int(order[at])} and {int(order[at + 1])} "
            f"have the same id {int(ordered[at])}: ids must be unique within a split."
        )


def _check_labels(image_set: ImageSet) -> None:
    labels = image_set.labels
    outside = ((labels < 0) | (labels >= image_set.num_classes)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise DataError(
            f"{_where(image_set)}: sample {int(image_set.sample_ids[at])} (position {at}) has the label "
            f"{int(labels[at])}, which is outside 0..{image_set.num_classes - 1}."
        )


def _where(image_set: ImageSet) -> str:
    return f"data set {image_set.name} ({image_set.split})"
