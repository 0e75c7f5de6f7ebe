"""One split of a data set: its images, in memory or in files, labels and ids, and how a store recognises it again."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.datasets.columns import check_columns
from stages.datasets.dropped import Dropped
from stages.datasets.image_files import ImageFiles, pixel_checksum
from stages.datasets.pixels import Pixels
from stages.errors import DataError
from store import ids_and_labels_sha256

STD_FLOOR = 1 / 255
"""Below one grey level there is nothing to normalise; dividing by less would only blow up rounding errors."""

FILES_NORMALISATION = {
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and std of files by their channels: ImageNet's, and what is usual for photographs in grey."""

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split.

    `images`: held, uint8 [N, C, H, W] with C 1 (grey) or 3 (RGB); or files that are decoded when needed. `labels` int64
    [N], each within [0, num_classes); `sample_ids` int64 [N], unique within the split, >= 0, the same on every machine.
    Anything else is a DataError. `dropped`: the images that could not be read and are not among the N.
    """

    name: str
    split: str
    images: Tensor | ImageFiles
    labels: Tensor
    sample_ids: Tensor
    class_names: tuple[str, ...]
    dropped: tuple[Dropped, ...] = ()

    def __post_init__(self) -> None:
        where = f"data set {self.name} ({self.split})"
        if isinstance(self.images, Tensor):
            _check_pixels(where, self.images)
        check_columns(where, self.num_samples, self.labels, self.sample_ids, self.num_classes)

    @property
    def held(self) -> bool:
        """Whether the images are in memory."""
        return isinstance(self.images, Tensor)

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1] if isinstance(self.images, Tensor) else self.images.channels

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W), in pixels; None for files of unequal size."""
        if isinstance(self.images, ImageFiles):
            return self.images.common_shape
        return self.images.shape[2], self.images.shape[3]

    def read(self, at: int) -> Pixels:
        """The image at position `at`: uint8 [C, H, W], an array of its own.

        DataError, naming the path, if it is a file that can no longer be decoded, or not to the same pixels.
        """
        if isinstance(self.images, ImageFiles):
            return self.images.read(at)
        return self.images[at].cpu().numpy().copy()

    def take(self, rows: Tensor) -> ImageSet:
        """The samples at `rows`, int64 [M], in that order; classes and `dropped` stay as they are."""
        images = self.images
        return dataclasses.replace(
            self,
            images=images.index_select(0, rows) if isinstance(images, Tensor) else images.take(rows),
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
        )


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
    """The crc32c of each sample's pixels (its [C, H, W] bytes, row by row), uint32 [N]; of files, as first read."""
    if isinstance(image_set.images, ImageFiles):
        return image_set.images.checksums
    images = image_set.images.cpu().numpy()
    return np.fromiter((pixel_checksum(image) for image in images), dtype=np.uint32, count=len(images))


def unequal_sizes_message(image_set: ImageSet) -> str:
    """Name two images of unequal size, for whoever needs them equal. ValueError if they all are."""
    files = image_set.images
    other = files.first_of_other_shape() if isinstance(files, ImageFiles) else None
    if isinstance(files, Tensor) or other is None:
        raise ValueError(f"the images of {image_set.name} are of one size")
    (height, width), (other_height, other_width) = files.shapes[0].tolist(), files.shapes[other].tolist()
    return (
        f"the images are of unequal size: {files.paths[0]} is {width} x {height}, "
        f"{files.paths[other]} is {other_width} x {other_height}: set data.image_size to crop and resize them."
    )


def normalisation(image_set: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the whole set, in [0, 1] units, rounded to 4 digits.

    Taken from counts of the 256 grey levels: exact integers, so neither the order nor the threads change a bit.
    Files are not decoded for it: they get FILES_NORMALISATION.
    """
    images = image_set.images
    if isinstance(images, ImageFiles):
        return FILES_NORMALISATION[images.channels]
    moments = [_moments(images[:, channel]) for channel in range(image_set.in_channels)]
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


def _check_pixels(where: str, images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
        raise DataError(
            f"{where}: images must be uint8 [N, C, H, W] with C 1 or 3, found {images.dtype} {list(shape)}."
        )
