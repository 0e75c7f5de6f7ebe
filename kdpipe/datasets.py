"""Data sets of the Python API."""

from __future__ import annotations

from typing import Any

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.load import load_dataset as load_split
from kdpipe.stages.data.splits import Split


def load_dataset(name: str = "digits", **options: Any) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test split of a data set.

    Args:
        name: `digits`, `MNIST`, `FashionMNIST`, `CIFAR10`, `CIFAR100`, `imagefolder:PATH`, `npz:PATH`,
            `python:module:function`, or a name given to `register_dataset`.
        **options: Keys of a recipe's `data` section, such as `root`, `image_size`, `classes` or `num_train`.

    Returns:
        Two map-style datasets of (uint8 image [C, H, W], label).

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
    return load_split(config, "train"), load_split(config, "test")


def as_image_set(dataset: Any, split: Split) -> ImageSet:
    """Return a data set as kdpipe reads it: an `ImageSet` as it is, a torch Dataset of (image, label) converted.

    Raises:
        DataError: It is neither, or its images or labels are ambiguous.
    """
    if isinstance(dataset, ImageSet):
        return dataset
    from kdpipe.stages.data.sources.torch_dataset import image_set_from_dataset

    return image_set_from_dataset(dataset, name=type(dataset).__name__, split=split)
