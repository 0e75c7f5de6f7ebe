"""Defaults of a new recipe by data set: networks, training lengths and augmentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetDefaults:
    """Networks, training lengths and augmentation with which a recipe for a data set begins.

    Attributes:
        widths: Width of the teacher and of the student, for networks that take one.
        epochs: Epochs of the teacher and of the student.
        crop: Padding of the random crop.
        flips: Whether images are flipped horizontally.
    """

    teacher: str
    student: str
    widths: tuple[int, int]
    epochs: tuple[int, int]
    batch_size: int
    crop: int
    flips: bool
    num_views: int
    temperature: float = 4.0


DIGITS = DatasetDefaults("cnn", "cnn", (32, 6), (40, 40), 64, 1, False, 20)
GRAY = DatasetDefaults("cnn", "cnn", (32, 4), (6, 10), 128, 2, False, 8)
COLOR = DatasetDefaults("resnet32x4", "resnet8x4", (32, 8), (120, 120), 64, 4, True, 16)
PHOTOS = DatasetDefaults("torchvision:resnet50", "torchvision:mobilenet_v2", (32, 8), (30, 60), 64, 0, True, 8, 2.0)
OTHER = DatasetDefaults("cnn", "cnn", (32, 8), (30, 30), 128, 2, False, 8)

DEFAULTS = {
    "digits": DIGITS,
    "MNIST": GRAY,
    "FashionMNIST": GRAY,
    "CIFAR10": COLOR,
    "CIFAR100": COLOR,
    "imagefolder": PHOTOS,
}


def defaults_for(data: str) -> DatasetDefaults:
    """Return the defaults for a data set by its name."""
    return DEFAULTS.get(data.partition(":")[0], OTHER)
