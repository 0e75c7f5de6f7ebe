"""Data sets of the Python API."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.data.load import load_dataset as load_split
from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.errors import DataError


def load_dataset(name: str = "digits", **options: Any) -> tuple[ImageSet, ...]:
    """Load the training and the test split of a data set.

    Args:
        name: `digits`, `MNIST`, `FashionMNIST`, `CIFAR10`, `CIFAR100`, `imagefolder:PATH`,
            `table:PATH`, `webdataset:PATH`, `lmdb:PATH`, `hf_dataset:OWNER/NAME`, `npz:PATH`,
            `python:module:function`, or a name given to `register_dataset`.
        **options: Keys of a recipe's `data` section, such as `root`, `image_size`, `classes`, `num_train` or `labels`.

    Returns:
        Two map-style datasets of (uint8 image [C, H, W], label or [K] of them); with `validation_share` three:
        training, validation and test images.

    Raises:
        DataError: There is no such data set, or it is damaged.
        RecipeError: An option does not exist, or does not fit.

    Example:
        >>> import kdpipe as kd
        >>> train, test = kd.load_dataset("digits", test_share=0.5)
        >>> train.num_samples, train.num_classes, train.image_size
        (896, 10, (8, 8))
    """
    config = DataConfig(name=name, **options)
    parts: tuple[Part, ...] = ("train", "validation", "test") if config.validation_share else ("train", "test")
    loaded = tuple(load_split(config, part) for part in parts)
    for image_set in loaded:
        left_out = [f"sample {dropped.sample_id} is left out: {dropped.why}" for dropped in image_set.dropped]
        for notice in (*image_set.notices, *left_out):
            warnings.warn(notice, stacklevel=2)
    return loaded


def as_validation(dataset: Any, train_set: ImageSet) -> ImageSet | None:
    """Return the validation images of a call; None without any."""
    if dataset is None:
        return None
    return replace(as_image_set(dataset, VALIDATION, like=train_set), split=VALIDATION)


def as_image_set(
    dataset: Any,
    split: Part = "train",
    *,
    like: ImageSet | None = None,
    labels: Literal["all", "none"] | int = "all",
    **options: Any,
) -> ImageSet:
    """Read a map-style torch Dataset of (image, label), as kdpipe keeps it; an `ImageSet` stays as it is.

    Images that take more than `max_bytes` (8 GiB), or are of unequal sizes, are read once for their checksums, and then
    on access; others are kept in memory. All functions do so with what they are given. Call it yourself to convert a
    large data set once, or to set options. A sample whose label is None or -1 is unlabeled.

    Args:
        dataset: The data set. Images must be raw: PIL images, uint8 arrays or tensors, or what ToTensor makes of them.
        split: "train", "validation" or "test".
        like: The training images, whose class names test images get if their data set has no `classes`.
        labels: Whose labels are used: those of all samples, of none, or of so many, with every class in proportion.
        **options: `name`, `class_names`, `sample_ids`, `image_size`, `channels`, `max_bytes` and `num_workers`, the
            processes that read it once; and `task`, "multilabel" or "regression", if the label of an image is no class
            but several labels (0 or 1) or numbers.

    Raises:
        DataError: It is neither, or its images or labels are ambiguous: normalized, augmented, of several sizes, ...

    Example:
        >>> import kdpipe as kd, torch
        >>> images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3
        >>> kd.as_image_set(torch.utils.data.TensorDataset(images, labels)).num_classes
        3
    """
    if isinstance(dataset, ImageSet):
        if options:
            raise DataError(f"data set {dataset.name} is converted already: {', '.join(options)} must be set before.")
        return keep_labels(dataset, labels)
    if isinstance(dataset, str):
        raise DataError(
            f"{dataset!r} is a name: load the data set first, train, test = kdpipe.load_dataset({dataset!r})."
        )
    from kdpipe.stages.data.sources.torch_dataset import image_set_from_dataset

    if like is not None:
        options.setdefault("task", like.task)
    if like is not None and not hasattr(dataset, "classes"):
        options.setdefault("class_names", like.class_names)
    found = image_set_from_dataset(dataset, **{"name": type(dataset).__name__, "split": split, **options})
    return keep_labels(found, labels)
