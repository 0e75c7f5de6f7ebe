"""The recipe's `data` section: which images, in what form, and what may be done with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.config import section
from stages.datasets.dropped import OnUnreadable


@section
class DataConfig:
    """Which images, and in what form.

    `root` is where named sets lie and where a relative PATH starts; `channels` turns grey into RGB or back;
    `image_size` crops the largest centred square and resizes it, `test_crop` first shrinks that square for the test
    images of an image folder. `classes` keeps only samples of these classes, `num_train` a fixed stratified subset of
    the training split; `test_share` splits a set that has no test split of its own.

    Image folders whose pixels take no more than `held_bytes` are held in memory; images that cannot be read stop the
    job, or are dropped, as `unreadable` says. `num_workers` processes decode what is not held; None is one for each
    core of the affinity mask.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    channels: Literal[1, 3] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    test_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_train: Annotated[int, Field(ge=1)] | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    held_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    unreadable: OnUnreadable = "stop"
    num_workers: Annotated[int, Field(ge=0)] | None = None
