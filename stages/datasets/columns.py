"""What must be true of the labels and ids of a data set, said in one sentence where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import DataError


def check_columns(where: str, num_images: int, labels: Tensor, sample_ids: Tensor, num_classes: int) -> None:
    """DataError unless `labels` and `sample_ids` are int64 [num_images], labels within [0, num_classes), ids >= 0 and
    each there once. `where` names the data set and its split.
    """
    if num_images == 0:
        raise DataError(f"{where} has no sample: wanted at least one.")
    _check_form(where, "labels", labels, num_images)
    _check_form(where, "sample_ids", sample_ids, num_images)
    _check_ids(where, sample_ids)
    _check_labels(where, labels, sample_ids, num_classes)


def _check_form(where: str, what: str, column: Tensor, num_images: int) -> None:
    if column.dtype != torch.int64 or tuple(column.shape) != (num_images,):
        raise DataError(
            f"{where}: {what} must be int64 [{num_images}], one for each image, "
            f"found {column.dtype} {list(column.shape)}."
        )


def _check_ids(where: str, ids: Tensor) -> None:
    negative = (ids < 0).nonzero()
    if len(negative):
        at = int(negative[0])
        raise DataError(f"{where}: the sample at position {at} has the id {int(ids[at])}: ids must be >= 0.")
    ordered, order = ids.sort(stable=True)
    twins = (ordered[1:] == ordered[:-1]).nonzero()
    if len(twins):
        at = int(twins[0])
        raise DataError(
            f"{where}: the samples at positions {int(order[at])} and {int(order[at + 1])} "
            f"have the same id {int(ordered[at])}: ids must be unique within a split."
        )


def _check_labels(where: str, labels: Tensor, sample_ids: Tensor, num_classes: int) -> None:
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise DataError(
            f"{where}: sample {int(sample_ids[at])} (position {at}) has the label "
            f"{int(labels[at])}, which is outside 0..{num_classes - 1}."
        )
