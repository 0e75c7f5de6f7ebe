"""Keep the labels of a part of the training samples: `data.labels`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from kdpipe.stages.data.image_set import UNLABELED, ImageSet
from kdpipe.stages.data.splits import stratified_subset
from kdpipe.stages.errors import RecipeError

LABELS_SEED = 2

KeptLabels = Literal["all", "none"] | int
"""Whose labels are kept: those of all samples, of none, or of so many."""


def keep_labels(image_set: ImageSet, kept: KeptLabels) -> ImageSet:
    """Return the samples of which only some keep their labels, with every class in proportion to its size.

    The labels of fewer samples are among those of more. What the samples were listed with still identifies them.

    Raises:
        RecipeError: There are not so many labeled samples.
    """
    if kept == "all":
        return image_set
    labeled = image_set.labeled
    if kept != "none" and kept > len(labeled):
        raise RecipeError(
            f"data.labels = {kept:,}: the {image_set.split} split of {image_set.name} has {len(labeled):,} labeled "
            "samples: give a lower number, or leave it out."
        )
    labels = torch.full_like(image_set.labels, UNLABELED)
    if kept != "none":
        chosen = labeled[torch.from_numpy(stratified_subset(image_set.labels[labeled].numpy(), kept, LABELS_SEED))]
        labels[chosen] = image_set.labels[chosen]
    return replace(image_set, labels=labels, listed=image_set.listed_labels)


def hide_labels(image_set: ImageSet, train_set: ImageSet) -> ImageSet:
    """Return the samples without the labels that `keep_labels` took from the training set."""
    if train_set.listed is None:
        return image_set
    known = torch.isin(image_set.sample_ids, train_set.sample_ids[train_set.labeled])
    labels = torch.where(known, image_set.labels, UNLABELED)
    return replace(image_set, labels=labels, listed=image_set.listed_labels)
