"""What is usual for images of a kind: networks, lengths and augmentation with which a new recipe begins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Habit:
    """What is usual for images of a kind: what a first recipe takes where nobody has said otherwise.

    widths: the teacher's and the student's, of networks that take one. crop: the padding of random crops.
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


DIGITS = Habit("cnn", "cnn", (32, 6), (40, 40), 64, 1, False, 20)
GREY = Habit("cnn", "cnn", (32, 4), (6, 10), 128, 2, False, 8)
COLOUR = Habit("resnet32x4", "resnet8x4", (32, 8), (120, 120), 64, 4, True, 16)
PHOTOGRAPHS = Habit("torchvision:resnet50", "torchvision:mobilenet_v2", (32, 8), (30, 60), 64, 0, True, 8, 2.0)
ANY = Habit("cnn", "cnn", (32, 8), (30, 30), 128, 2, False, 8)

HABITS = {
    "digits": DIGITS,
    "MNIST": GREY,
    "FashionMNIST": GREY,
    "CIFAR10": COLOUR,
    "CIFAR100": COLOUR,
    "imagefolder": PHOTOGRAPHS,
}


def habit_of(data: str) -> Habit:
    """What is usual for a data set by its name."""
    return HABITS.get(data.partition(":")[0], ANY)
