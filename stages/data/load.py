"""Load a data set as configured by the recipe's `data` section."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.decode import DecodeSpec, with_channels, with_size
from kdpipe.stages.data.image_files import ImageFileList, ImageFiles
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.data.names import FILE_KINDS, KNOWN_NAMES, TORCHVISION_NAMES
from kdpipe.stages.data.scan import OnImage, ScanResult, scan_images
from kdpipe.stages.data.sources.image_folder import list_image_folder
from kdpipe.stages.data.sources.listing import (
    Listing,
    absent_classes,
    other_tasks,
    refuse_shifted,
    unlabeled_samples,
)
from kdpipe.stages.data.sources.npz import list_npz
from kdpipe.stages.data.sources.packed.hf_dataset import list_hf_dataset
from kdpipe.stages.data.sources.packed.lmdb import list_lmdb
from kdpipe.stages.data.sources.packed.webdataset import list_webdataset
from kdpipe.stages.data.sources.table import list_table
from kdpipe.stages.data.sources.torchvision import list_digits, list_torchvision
from kdpipe.stages.data.sources.user_function import DATASETS, is_user_dataset, list_user_dataset
from kdpipe.stages.data.splits import Indices, Part, Split, stratified_split, stratified_subset, validation_split
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL
from kdpipe.stages.errors import DataError, RecipeError, UnknownDataError, first_few
from kdpipe.store.errors import did_you_mean


def load_dataset(
    config: DataConfig,
    split: Part,
    *,
    size: int | None = None,
    only: Indices | None = None,
    keep: bool = True,
    on_image: OnImage | None = None,
    name_classes: Callable[[], tuple[str, ...]] = tuple,
) -> ImageSet:
    """Load a part of a data set: uint8 [N, C, H, W] in memory, or files.

    Images of a folder stay files if they take more than `config.cache_bytes` or differ in size; everything else is in
    memory. Sample ids do not depend on `classes`, `num_train`, `channels` or sizes.

    Args:
        size: Replaces `config.image_size`.
        only: Ids of the samples to load; None loads all.
        keep: Whether to keep the images of a folder in memory where they fit; otherwise they stay files.
        name_classes: Names the classes of unlabeled images where neither the data set nor `classes` does.
        on_image: Called with (done, total) from time to time while files are scanned; may raise to abort, which keeps
            most of the scan.

    Raises:
        DataError: The name is unknown, or the data is missing, damaged or invalid.
        RecipeError: `config` names unknown classes or an impossible crop.
    """
    if split not in get_args(Part):
        raise DataError(f"unknown split {split!r}: expected 'train', 'validation' or 'test'.")
    size = config.image_size if size is None else size
    listing = list_source(config, split, size, on_image)
    indices = _select(listing, config, split)
    if only is not None:
        indices = indices[np.isin(listing.sample_ids[indices], only)]
    found = _load_images(listing, indices, config, size, on_image, keep=keep)
    indices = indices[found.kept]
    labels, names = listing.labels[indices], listing.class_names or _names_of(config, size, name_classes)
    targets = None if listing.targets is None else listing.targets[indices]
    absent = absent_classes(listing.name, split, labels, names, config.classes, targets=targets)
    absent += unlabeled_samples(listing.name, split, labels)
    loaded = ImageSet(
        name=listing.name,
        split=split,
        images=torch.from_numpy(found.images) if isinstance(found.images, np.ndarray) else found.images,
        labels=torch.from_numpy(labels),
        sample_ids=torch.from_numpy(listing.sample_ids[indices]),
        class_names=names,
        dropped=found.dropped,
        crop=1.0 if split == "train" else config.test_crop,
        notices=(*listing.notices, *absent) if only is None else (),
        task=config.task,
        targets=None if targets is None else torch.from_numpy(targets),
    )
    may_count_from_minus_one = config.name.startswith("npz:") or is_user_dataset(config.name)
    if split == "train" and config.labels == "all" and targets is None and may_count_from_minus_one:
        refuse_shifted(listing.name, labels, names)
    if split == "train" and config.labels != "none" and not loaded.has_labels:
        raise DataError(f"no training sample of {listing.name} has a label: set data.labels = 'none'.")
    keeps_all = split == "test" or (split == "validation" and config.labels != "none")
    return loaded if keeps_all else keep_labels(loaded, config.labels)


def _names_of(config: DataConfig, size: int | None, name_classes: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the class names of samples without labels: the test split's, `data.classes`, or the teacher's."""
    found = list_source(config, "test", size).class_names or config.classes or name_classes()
    if not found:
        raise DataError(
            f"no sample of {config.name} has a label, so that its classes are not known: name them in the order of the "
            "teacher's outputs (data.classes)."
        )
    return tuple(found)


def list_source(config: DataConfig, part: Part, size: int | None, on_image: OnImage | None = None) -> Listing:
    """List the samples of the data set `config.name` that a part is taken from; files are to be decoded to `size`.

    A torch Dataset that does not fit in memory is read once, which `on_image` is told.

    Raises:
        UnknownDataError: There is no such source.
        RecipeError: `test_crop` is set where it does not apply.
    """
    split: Split = "test" if part == "test" else "train"
    kind, colon, argument = config.name.partition(":")
    root = _path(config.root)
    require_applicable(config)
    if colon and argument and kind in FILE_KINDS:
        return _list_files(config, kind, argument, split, _decode_spec(config, part, size))
    if config.name == "digits":
        return list_digits()
    if config.name in TORCHVISION_NAMES:
        return list_torchvision(config.name, split, root=root, download=config.download)
    if colon and argument and kind == "npz":
        return list_npz(_path(argument, config.root), split, config.task)
    if is_user_dataset(config.name):
        limits = {"max_bytes": config.cache_bytes, "num_workers": config.num_workers, "on_image": on_image}
        return list_user_dataset(
            config.name, split, root=root, size=size, channels=config.channels, task=config.task, **limits
        )
    known = [*KNOWN_NAMES, *DATASETS.registered()]
    near = did_you_mean(config.name, known, limit=2, otherwise="")
    raise UnknownDataError(
        f"unknown data set data.name={config.name!r}; {near}{' ' if near else ''}known names: {', '.join(known)}."
    )


def _list_files(config: DataConfig, kind: str, argument: str, split: Split, spec: DecodeSpec) -> Listing:
    path, columns = _path(argument, config.root), (config.image_column, config.label_column)
    unlabeled = config.labels == "none"
    if kind == "table":
        return list_table(path, split, spec, columns, config.task, separator=config.label_separator)
    if kind == "hf_dataset":
        return list_hf_dataset(
            argument,
            path,
            split,
            spec,
            columns=columns,
            download=config.download,
            unlabeled=unlabeled,
            task=config.task,
        )
    if kind == "imagefolder":
        return list_image_folder(path, split, spec, unlabeled=unlabeled)
    return (list_webdataset if kind == "webdataset" else list_lmdb)(path, split, spec)


def require_applicable(config: DataConfig) -> None:
    """Raise RecipeError if a key is set that does not apply to data sets of this kind, or to this task."""
    columns = ("table", "hf_dataset")
    applicable = {"test_crop": FILE_KINDS, "image_column": columns, "label_column": columns}
    for key, kinds in {**applicable, "label_separator": ("table",)}.items():
        is_set = getattr(config, key) != DataConfig.__dataclass_fields__[key].default
        if is_set and config.name.partition(":")[0] not in kinds:
            raise RecipeError(
                f"data.{key} applies only to {', '.join(kinds)}, and data.name is {config.name!r}: remove it."
            )
    if config.label_separator is not None and (config.task != MULTILABEL or isinstance(config.label_column, tuple)):
        raise RecipeError(
            "data.label_separator is for several labels in one column: set data.task = 'multilabel', and name one "
            "column in data.label_column."
        )
    if config.task == CLASSIFICATION:
        if isinstance(config.label_column, tuple):
            raise RecipeError(f"data.label_column names several columns: one holds the class.{other_tasks()}")
        return
    kind = config.name.partition(":")[0]
    if kind not in ("table", "hf_dataset", "npz") and not is_user_dataset(config.name):
        raise RecipeError(
            f"data.task = {config.task!r}: {config.name} has classes only; npz:PATH, table:PATH, "
            "hf_dataset:OWNER/NAME and python:MODULE:FUNCTION may have other labels."
        )
    if config.classes is not None:
        raise RecipeError(
            f"data.classes selects samples of some classes, and with data.task = {config.task!r} they "
            "have none: remove it."
        )


def _decode_spec(config: DataConfig, part: Part, size: int | None) -> DecodeSpec:
    channels = config.channels or 3
    if part == "train":
        return DecodeSpec(channels, size)
    if config.test_crop != 1 and size is None:
        raise RecipeError("data.test_crop needs a size for the cropped images: set data.image_size.")
    return DecodeSpec(channels, size, config.test_crop)


def _path(text: str, below: str = "") -> Path:
    """Return `text` as an absolute path with `~` expanded, relative to `below`, without `.` and `..`."""
    below, text = os.path.expanduser(below), os.path.expanduser(text)  # noqa: PTH111 - Path's rejects an unknown ~user
    return Path(os.path.abspath(os.path.join(below, text)))  # noqa: PTH100, PTH118 - resolve() would follow links


def _load_images(
    listing: Listing, indices: Indices, config: DataConfig, size: int | None, on_image: OnImage | None, *, keep: bool
) -> ScanResult:
    if isinstance(listing.images, ImageFileList):
        return scan_images(
            listing.images,
            indices,
            cache_bytes=config.cache_bytes,
            keep=keep,
            drop_unreadable=config.unreadable == "drop",
            on_image=on_image,
        )
    if isinstance(listing.images, ImageFiles):
        return ScanResult(listing.images.take(torch.from_numpy(indices)), np.arange(len(indices)), ())
    pixels = with_size(with_channels(listing.images(indices), config.channels), size, f"data set {listing.name}")
    return ScanResult(pixels, np.arange(len(indices)), ())


def _select(listing: Listing, config: DataConfig, part: Part) -> Indices:
    """Return the listing's indices, ascending, selected by split, classes, `num_train` and `validation_share`."""
    indices = np.arange(len(listing.labels))
    if listing.unsplit:
        train, test = stratified_split(listing.labels, config.test_share)
        indices = test if part == "test" else train
    if config.classes is not None and listing.class_names:
        indices = indices[np.isin(listing.labels[indices], _labels_of(config.classes, listing))]
        if not len(indices):
            raise DataError(f"data set {listing.name} ({part}) has no samples of the classes in data.classes.")
    if part != "test" and config.num_train is not None:
        indices = indices[stratified_subset(listing.labels[indices], config.num_train)]
    if part != "test" and config.validation_share:
        ids = listing.sample_ids[indices]
        train, validation = validation_split(listing.labels[indices], ids, config.validation_share)
        return indices[train if part == "train" else validation]
    if part == "validation":
        raise RecipeError("there are no validation images: set data.validation_share.")
    return indices


def _labels_of(classes: tuple[str, ...], listing: Listing) -> list[int]:
    known = listing.class_names
    for name in classes:
        if name not in known:
            advice = did_you_mean(name, known, limit=3, otherwise=f"its classes are {first_few(known)}.")
            raise RecipeError(f"data.classes: {listing.name} has no class {name!r}: {advice}")
    return [label for label, name in enumerate(known) if name in classes]
