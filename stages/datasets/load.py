"""The one way to a data set: by the recipe's `data` section."""

from __future__ import annotations

import difflib
from typing import get_args

import numpy as np
import torch

from stages.datasets.config import DataConfig
from stages.datasets.image_set import ImageSet
from stages.datasets.listing import Listing
from stages.datasets.photographs import Photographs
from stages.datasets.pixels import with_channels, with_size
from stages.datasets.sources import list_source
from stages.datasets.split import Rows, Split, stratified_split, stratified_subset
from stages.datasets.survey import OnImage, Surveyed, survey
from stages.errors import DataError, RecipeError

__all__ = ["DataConfig", "load_dataset"]


def load_dataset(
    config: DataConfig,
    split: Split,
    *,
    size: int | None = None,
    only: Rows | None = None,
    on_image: OnImage | None = None,
) -> ImageSet:
    """Load one split of the data set that `config` names: uint8 [N, C, H, W] in memory, or files.

    Images of a folder become files if they take more than `config.held_bytes`, or are of unequal size; all else is
    held. `size` stands in for `config.image_size`; `only` are the ids of the samples wanted, where not all are. While
    files are looked at, `on_image` is told (done, all) now and then; what it raises breaks off, and little of what was
    seen is lost. A sample keeps its id whatever `classes`, `num_train`, `channels` and sizes say.
    DataError if the name is unknown, or the data is missing, damaged, or not as it must be; RecipeError if `config`
    names unknown classes, or asks for a crop that cannot be.
    """
    if split not in get_args(Split):
        raise DataError(f"no split {split!r}: wanted 'train' or 'test'.")
    size = config.image_size if size is None else size
    listing = list_source(config, split, size)
    rows = _rows(listing, config, split)
    if only is not None:
        rows = rows[np.isin(listing.sample_ids[rows], only)]
    found = _images(listing, rows, config, size, on_image)
    rows = rows[found.kept]
    return ImageSet(
        name=listing.name,
        split=split,
        images=torch.from_numpy(found.images) if isinstance(found.images, np.ndarray) else found.images,
        labels=torch.from_numpy(listing.labels[rows]),
        sample_ids=torch.from_numpy(listing.sample_ids[rows]),
        class_names=listing.class_names,
        dropped=found.dropped,
    )


def _images(listing: Listing, rows: Rows, config: DataConfig, size: int | None, on_image: OnImage | None) -> Surveyed:
    if isinstance(listing.images, Photographs):
        return survey(
            listing.images,
            rows,
            held_bytes=config.held_bytes,
            on_unreadable=config.unreadable,
            on_image=on_image,
        )
    pixels = with_size(with_channels(listing.images(rows), config.channels), size, f"data set {listing.name}")
    return Surveyed(pixels, np.arange(len(rows)), ())


def _rows(listing: Listing, config: DataConfig, split: Split) -> Rows:
    """Positions in the listing, ascending: the split's, of those the classes', of those `num_train` if asked for."""
    rows = np.arange(len(listing.labels))
    if listing.whole:
        train, test = stratified_split(listing.labels, config.test_share)
        rows = train if split == "train" else test
    if config.classes is not None:
        rows = rows[np.isin(listing.labels[rows], _labels_of(config.classes, listing))]
        if not len(rows):
            raise DataError(f"data set {listing.name} ({split}) has no sample of the classes in data.classes.")
    if split == "train" and config.num_train is not None:
        rows = rows[stratified_subset(listing.labels[rows], config.num_train)]
    return rows


def _labels_of(classes: tuple[str, ...], listing: Listing) -> list[int]:
    known = listing.class_names
    for name in classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
            advice = f"did you mean {' or '.join(near)}?" if near else f"its classes are {some}."
            raise RecipeError(f"data.classes: {listing.name} has no class {name!r}: {advice}")
    return [label for label, name in enumerate(known) if name in classes]
