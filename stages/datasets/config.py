"""The recipe's `data` section: which images, in what form, and what may be done with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stages.config import Bytes, Place, section
from stages.datasets.dropped import OnUnreadable


def _no_truth(value: object) -> object:
    if type(value) is bool:  # which Python, and so pydantic, takes for 1
        raise ValueError("input should be 1 or 3")
    return value


@section
class DataConfig:
    """Which images, and in what form.

    name: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, imagefolder:PATH, npz:PATH or python:MODULE:FUNCTION.
    root: where named sets lie and where a relative PATH starts.
    download: whether torchvision may download a named set.
    channels: turns grey into RGB or back.
    image_size: crops the largest centred square and resizes it to so many pixels.
    test_crop: first shrinks that square for the test images of an image folder.
    classes: keeps only samples of these classes.
    num_train: keeps a fixed stratified subset of the training split.
    test_share: splits a set that has no test split of its own.
    held_bytes: image folders whose pixels take no more than this are held in memory.
    unreadable: images that cannot be read "stop" the job, or are left out ("drop").
    num_workers: processes that decode what is not held; None is one for each core of this process.
    """

    name: Place = "digits"
    root: Place = "data"
    download: bool = True
    channels: Annotated[Literal[1, 3], BeforeValidator(_no_truth)] | None = None
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    test_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_train: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    held_bytes: Bytes = 8 * 2**30
    unreadable: OnUnreadable = "stop"
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
