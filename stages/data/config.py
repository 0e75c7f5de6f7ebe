"""The recipe's `data` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from kdpipe.stages.config import Bytes, PathStr, section
from kdpipe.stages.data.tasks import CLASSIFICATION, LabelTask


def _reject_bool(value: object) -> object:
    if type(value) is bool:  # True == 1 in Python, so pydantic would accept it
        raise ValueError("it must be 1 or 3")
    return value


def _require_labels(value: object) -> object:
    if value in ("all", "none") or (type(value) is int and 1 <= value < 2**63):
        return value
    raise ValueError("it must be 'all', 'none' or a positive number")


@section
class DataConfig:
    """Configuration of the data set.

    Attributes:
        name: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, imagefolder:PATH, table:PATH, webdataset:PATH, lmdb:PATH,
            hf_dataset:OWNER/NAME, npz:PATH, python:MODULE:FUNCTION, or a registered name.
        task: What the images are labeled with: "classification", one class each; "multilabel", any of several labels;
            "regression", one or several numbers.
        root: Folder of the named sets, and base of a relative PATH.
        download: Whether torchvision may download a named set, and hf_dataset may ask the hub.
        image_column: Column of the images of table and hf_dataset; found by its name or type if None.
        label_column: Column of their labels; found by its name or type if None. With a task of several labels or
            numbers also a list of columns.
        label_separator: What is between the names of an image's labels in that column of table, with the task
            "multilabel".
        channels: Convert to grayscale (1) or RGB (3).
        image_size: Crop the largest centered square and resize it to this many pixels.
        test_crop: Fraction of that square kept for the test images of files.
        classes: Keep only samples of these classes; of images without labels, the classes that the teacher tells apart.
        num_train: Keep a fixed stratified subset of the training split.
        test_share: Fraction split off for testing where the set has no test split.
        labels: Keep the labels of "all" training samples, of "none", or of so many, with every class in proportion; the
            others are unlabeled images. "none" holds for the validation images, too.
        validation_share: Fraction of the training images, of every class, that is not trained on or cached but decides
            instead of the test images: accuracy of each epoch, weights of teachers by accuracy, the best of variants.
        cache_bytes: Keep the decoded images of files in memory if they take no more than this.
        unreadable: "stop" the job at an image that cannot be read, or "drop" the sample.
        num_workers: Processes that decode images not in memory; None means one for each core of this process.
    """

    name: PathStr = "digits"
    task: LabelTask = CLASSIFICATION
    root: PathStr = "data"
    download: bool = True
    image_column: PathStr | None = None
    label_column: PathStr | Annotated[tuple[PathStr, ...], Field(min_length=1)] | None = None
    label_separator: Literal["|", ";", ",", "/", "+", "&"] | None = None
    channels: Annotated[Literal[1, 3], BeforeValidator(_reject_bool)] | None = None
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    test_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_train: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    labels: Annotated[
        Literal["all", "none"] | Annotated[int, Field(ge=1, lt=2**63)], BeforeValidator(_require_labels)
    ] = "all"
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    cache_bytes: Bytes = 8 * 2**30
    unreadable: Literal["stop", "drop"] = "stop"
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
