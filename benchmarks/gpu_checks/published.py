"""The published pair on CIFAR-100, resnet32x4 to resnet8x4, for as many epochs as the time allows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import kdpipe as kd
from gpu_checks import Row, Settings

PUBLISHED = "Tian et al. 2020, Zhao et al. 2022, 240 epochs: alone 72.5, KD 73.3, DKD 76.3"


def cifar100(settings: Settings) -> Iterator[Row]:
    """Train the teacher, the student alone and the student with KD, briefly; report accuracies and epoch times."""
    if settings.data is None:
        yield Row("CIFAR-100", "no --data was given")
        return
    train, test = kd.load_dataset("CIFAR100", root=str(settings.data))
    folder, epochs = settings.folder("cifar100"), settings.size(3, 1)
    options: Any = {"device": settings.device, "progress": False, "batch_size": 64, "lr": 0.05}
    views = kd.Views(epochs, ["RandomCrop", "RandomHorizontalFlip"])
    yield Row("published", PUBLISHED)
    yield Row("epochs here", str(epochs))

    started = time.monotonic()
    network = kd.create_model("resnet32x4", train)
    teacher = kd.train_teacher(network, train, test=test, epochs=epochs, run=folder / "teacher", **options)
    yield Row("teacher: test accuracy", teacher.accuracy)
    yield Row("teacher: seconds", time.monotonic() - started)
    started = time.monotonic()
    store = kd.cache_teacher(teacher, train, folder / "store.zarr", views=views, device=settings.device)
    yield Row("cached views, images/s", epochs * train.num_samples / (time.monotonic() - started))
    for name, targets in (("alone", None), ("KD", store)):
        started = time.monotonic()
        student = kd.train_student("resnet8x4", train, targets, test=test, epochs=epochs, run=folder / name, **options)
        yield Row(f"{name}: test accuracy", student.accuracy)
        yield Row(f"{name}: seconds", time.monotonic() - started)
