"""The names of data sets that a recipe can give, and the shapes of those that are fixed. Imports nothing."""

from __future__ import annotations

TORCHVISION_NAMES = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")

FILES = (
    "imagefolder:PATH",
    "table:PATH",
    "webdataset:PATH",
    "lmdb:PATH",
    "hf_dataset:OWNER/NAME",
)

FILE_KINDS = tuple(name.partition(":")[0] for name in FILES)
"""Data sets of encoded images, which are decoded on access."""

KNOWN_NAMES = ("digits", *TORCHVISION_NAMES, *FILES, "npz:PATH", "python:MODULE:FUNCTION")

KINDS = {name.partition(":")[0] for name in KNOWN_NAMES}

SHAPES: dict[str, tuple[int, int | None, int | None]] = {
    "digits": (10, 1, 8),
    "MNIST": (10, 1, 28),
    "FashionMNIST": (10, 1, 28),
    "CIFAR10": (10, 3, 32),
    "CIFAR100": (100, 3, 32),
}
"""Classes, channels and side of the named data sets."""

NUM_CLASSES = 10
"""Assumed where only the data has the number; no network or loss is refused because of it."""
