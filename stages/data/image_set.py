"""One split of a data set: images (in memory or files), labels and sample ids, and its identity in a store."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.stages.data.decode import Pixels
from kdpipe.stages.data.image_files import ImageFiles, pixel_checksum
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, Task
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.store import ids_and_labels_sha256

STD_FLOOR = 1 / 255
"""Minimum standard deviation, one gray level: dividing by less would only amplify rounding errors."""

FILES_NORMALIZATION = {
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and std of image files by number of channels: ImageNet's, and the usual values for grayscale photographs."""

UNLABELED = -1
"""The label of a sample without one, as in scikit-learn."""

_CHUNK = 4096


@dataclass(frozen=True)
class DroppedImage:
    """An unreadable image that was left out of its data set, and the reason."""

    path: str
    sample_id: int
    why: str


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split; a map-style torch Dataset of (uint8 [C, H, W], label).

    Attributes:
        images: In memory, uint8 [N, C, H, W] with C 1 (grayscale) or 3 (RGB); or files decoded on access.
        labels: int64 [N], each within [0, num_classes), or -1: unlabeled.
        sample_ids: int64 [N], unique within the split, >= 0, the same on every machine.
        dropped: Unreadable images, which are not among the N.
        crop: The share of their centered square that the images were cropped to before they were resized.
        notices: Sentences on what was left out, or was not plain, when the set was loaded.
        listed: The labels of the source, int64 [N], where some of them are not used; they identify the samples.
        task: What the samples are labeled with. If not with classes, `class_names` are the names of the K labels or
            numbers, and `labels` are 0 of labeled samples.
        targets: float32 [N, K], the labels (0 or 1) or numbers of each sample, NaN where not known; None of classes.

    Raises:
        DataError: There are no samples, a label is out of range, or an id is negative or not unique.
    """

    name: str
    split: str
    images: Tensor | ImageFiles
    labels: Tensor
    sample_ids: Tensor
    class_names: tuple[str, ...]
    dropped: tuple[DroppedImage, ...] = ()
    crop: float = 1.0
    notices: tuple[str, ...] = ()
    listed: Tensor | None = None
    task: Task = CLASSIFICATION
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        where = f"data set {self.name} ({self.split})"
        _check_columns(where, self.num_samples, self.labels, self.sample_ids, self.num_classes)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Return the image, uint8 [C, H, W], and the label of a sample, or its targets float32 [K]."""
        position = range(self.num_samples)[index]  # IndexError beyond the end, as a loop over the samples needs
        label = self.labels_at(torch.tensor([position]))[0]
        return torch.from_numpy(self.read(position)), int(label) if self.targets is None else label

    def labels_at(self, positions: Tensor) -> Tensor:
        """Return what is learned of some samples: classes int64 [n], -1 if unlabeled; or targets float32 [n, K]."""
        if self.targets is None:
            return self.labels[positions]
        return torch.where(self.labels[positions, None] == UNLABELED, torch.nan, self.targets[positions])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as torchvision's data sets call them."""
        return self.class_names

    @property
    def in_memory(self) -> bool:
        """Whether the images are in memory."""
        return isinstance(self.images, Tensor)

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def has_labels(self) -> bool:
        """Whether any sample has a label."""
        return bool((self.labels != UNLABELED).any())

    @cached_property
    def is_labeled(self) -> bool:
        """Whether every sample has a label."""
        return bool((self.labels != UNLABELED).all())

    @cached_property
    def labeled(self) -> Tensor:
        """The positions of the samples with a label, int64 [M]."""
        return (self.labels != UNLABELED).nonzero()[:, 0]

    @property
    def listed_labels(self) -> Tensor:
        """The labels of the source, int64 [N], by which stores identify the samples; of targets, their checksums."""
        if self.targets is not None:
            return self._checksums
        return self.labels if self.listed is None else self.listed

    @cached_property
    def _checksums(self) -> Tensor:
        """The crc32c of the targets of each sample, int64 [N]; -1 of samples without any."""
        assert self.targets is not None
        rows = self.targets.numpy()
        sums = torch.tensor([pixel_checksum(row) for row in rows], dtype=torch.int64)
        return torch.where(self.targets.isnan().all(1), UNLABELED, sums)

    def label_name(self, position: int) -> str:
        """Return the name of a sample's class."""
        label = int(self.labels[position])
        if label == UNLABELED:
            return "unlabeled"
        if self.targets is None:
            return self.class_names[label]
        pairs = list(zip(self.class_names, self.targets[position].tolist(), strict=True))
        if self.task == MULTILABEL:
            return ", ".join(name for name, value in pairs if value == 1) or "no label"
        return ", ".join(f"{name} {value:g}" for name, value in pairs)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1] if isinstance(self.images, Tensor) else self.images.spec.channels

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels; None for files of unequal size."""
        if isinstance(self.images, ImageFiles):
            return self.images.common_shape
        return self.images.shape[2], self.images.shape[3]

    def read(self, index: int) -> Pixels:
        """Return one image as a new uint8 array [C, H, W].

        Raises:
            DataError: The file can no longer be decoded, or its pixels changed.
        """
        if isinstance(self.images, ImageFiles):
            return self.images.read(index)
        return self.images[index].cpu().numpy().copy()

    def take(self, indices: Tensor) -> ImageSet:
        """Return the samples at `indices`, int64 [M], in that order; classes and `dropped` are unchanged."""
        images = self.images
        return dataclasses.replace(
            self,
            images=images.index_select(0, indices) if isinstance(images, Tensor) else images.take(indices),
            labels=self.labels[indices],
            listed=None if self.listed is None else self.listed[indices],
            targets=None if self.targets is None else self.targets[indices],
            sample_ids=self.sample_ids[indices],
        )


def require_labels(image_set: ImageSet) -> None:
    """Raise DataError for samples that are to be learned without a teacher, if none has a label."""
    if not image_set.has_labels:
        raise DataError(
            f"no {image_set.split} image of {image_set.name} has a label, and without a teacher there is nothing to "
            "learn from them: distil from a teacher with given weights, or give labels."
        )


def require_classes(image_set: ImageSet, key: str) -> None:
    """Raise RecipeError if images are not labeled with classes, which the recipe's `key` is for."""
    if image_set.task != CLASSIFICATION:
        raise RecipeError(f"{key} is for classes, and data.task is {image_set.task!r}: leave it out.")


def digest(image_set: ImageSet) -> dict[str, Any]:
    """Identify the samples as JSON: name, split, counts, and a sha256 over ids and labels.

    The order of the samples does not matter: they are looked up by id.
    """
    return {
        "name": image_set.name,
        "split": image_set.split,
        "num_samples": image_set.num_samples,
        "num_classes": image_set.num_classes,
        "ids_and_labels_sha256": ids_and_labels_sha256(image_set.sample_ids.numpy(), image_set.listed_labels.numpy()),
        **({} if image_set.task == CLASSIFICATION else {"task": image_set.task}),
    }


def kept_labels(image_set: ImageSet) -> dict[str, Any]:
    """Identify which labels are used, as JSON; nothing if those are all of the source."""
    if image_set.listed is None:
        return {}
    return {"kept_labels_sha256": ids_and_labels_sha256(image_set.sample_ids.numpy(), image_set.labels.numpy())}


def pixel_checksums(image_set: ImageSet) -> npt.NDArray[np.uint32]:
    """Return the crc32c of each sample's [C, H, W] bytes, row by row: uint32 [N]; of files, as first scanned."""
    if isinstance(image_set.images, ImageFiles):
        return image_set.images.checksums
    images = image_set.images.cpu().numpy()
    return np.fromiter((pixel_checksum(image) for image in images), dtype=np.uint32, count=len(images))


def unequal_sizes_message(image_set: ImageSet) -> str:
    """Return an error message naming two images of unequal size. Raises ValueError if all have one size."""
    files = image_set.images
    other = files.first_of_other_shape() if isinstance(files, ImageFiles) else None
    if isinstance(files, Tensor) or other is None:
        raise ValueError(f"all images of {image_set.name} have the same size")
    (height, width), (other_height, other_width) = files.shapes[0].tolist(), files.shapes[other].tolist()
    return (
        f"the images have different sizes: {files.source.where(0)} is {width} x {height}, "
        f"{files.source.where(other)} is {other_width} x {other_height}: set data.image_size to crop and "
        "resize them (in Python: image_size= of kdpipe.load_dataset or kdpipe.as_image_set)."
    )


def normalization(image_set: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation over the set, in [0, 1] units, rounded to 4 digits.

    Computed from counts of the 256 gray levels: exact integers, independent of order and threads. Files are not
    decoded for it: they get FILES_NORMALIZATION.
    """
    images = image_set.images
    if isinstance(images, Tensor):
        moments = [_moments(_levels(images[:, channel])) for channel in range(image_set.in_channels)]
    elif images.levels is not None:  # a run keeps them in memory
        moments = [_moments(torch.from_numpy(counts)) for counts in images.levels]
    else:
        return FILES_NORMALIZATION[images.spec.channels]
    return tuple(mean for mean, _ in moments), tuple(std for _, std in moments)


def _levels(channel: Tensor) -> Tensor:
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in torch.split(channel, _CHUNK):
        counts += torch.bincount(chunk.reshape(-1), minlength=256).cpu()
    return counts


def _moments(counts: Tensor) -> tuple[float, float]:
    levels = [(level, int(count)) for level, count in enumerate(counts)]
    total = sum(count for _, count in levels)
    first = sum(level * count for level, count in levels)
    second = sum(level * level * count for level, count in levels)
    std = math.sqrt(second * total - first * first) / (255 * total)
    return round(first / (255 * total), 4), round(max(std, STD_FLOOR), 4)


def _check_columns(where: str, num_images: int, labels: Tensor, sample_ids: Tensor, num_classes: int) -> None:
    """Raise DataError unless there are samples, labels are in [0, num_classes) or -1, and ids unique and >= 0."""
    if num_images == 0:
        raise DataError(f"{where} has no samples: at least one is required.")
    _check_ids(where, sample_ids)
    one_based = int(labels.min()) == 1 and int(labels.max()) == num_classes
    outside = ((labels < UNLABELED) | (labels >= num_classes)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise DataError(
            f"{where}: sample {int(sample_ids[index])} (position {index}) has the label "
            f"{int(labels[index])}, which is outside 0..{num_classes - 1}."
            + (" The labels start at 1: subtract 1." if one_based else "")
        )


def _check_ids(where: str, ids: Tensor) -> None:
    negative = (ids < 0).nonzero()
    if len(negative):
        index = int(negative[0])
        raise DataError(f"{where}: the sample at position {index} has the id {int(ids[index])}: ids must be >= 0.")
    ordered, order = ids.sort(stable=True)
    duplicates = (ordered[1:] == ordered[:-1]).nonzero()
    if len(duplicates):
        index = int(duplicates[0])
        raise DataError(
            f"{where}: the samples at positions {int(order[index])} and {int(order[index + 1])} "
            f"have the same id {int(ordered[index])}: ids must be unique within a split."
        )
