"""What a source knows of its samples before a pixel is decoded, and how arrays of any origin become such a listing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stages.datasets.photographs import Photographs
from stages.datasets.pixels import Pixels
from stages.datasets.split import Rows
from stages.errors import DataError

MAX_NUMBERED_CLASSES = 1_000_000
"""Without class names the largest label says how many classes there are: beyond this it is surely a mistake."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The samples of one split, or (`whole`) of a set that has no split of its own.

    `labels` and `sample_ids` are int64 [N]; `images` are files [N], or a function that takes positions int64 [M] and
    gives their pixels, uint8 [M, C, H, W].
    """

    name: str
    labels: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    images: Photographs | Callable[[Rows], Pixels]
    whole: bool = False


def list_arrays(
    name: str,
    images: Any,
    labels: Any,
    sample_ids: Any = None,
    *,
    class_names: tuple[str, ...] | None = None,
    whole: bool = False,
) -> Listing:
    """List images that are already in memory: uint8 [N, H, W] or [N, H, W, C], labels and ids integer [N].

    Arrays may be numpy's or torch's. Ids default to the positions, class names to the numbers of the labels.
    DataError if anything has another type or shape.
    """
    pixels = _pixels(name, images)
    label_column = integer_column(name, "labels", labels, len(pixels))
    id_column = np.arange(len(pixels)) if sample_ids is None else sample_ids
    return Listing(
        name=name,
        labels=label_column,
        sample_ids=integer_column(name, "ids", id_column, len(pixels)),
        class_names=numbered_classes(name, label_column) if class_names is None else class_names,
        images=lambda rows: np.ascontiguousarray(pixels[rows]),
        whole=whole,
    )


def numbered_classes(name: str, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """The class names "0", "1", ... up to the largest label."""
    largest = int(labels.max())
    if largest >= MAX_NUMBERED_CLASSES:
        raise DataError(f"data set {name}: the label {largest} is too large: labels must be 0, 1, ... C - 1.")
    return tuple(str(label) for label in range(largest + 1))


def integer_column(name: str, what: str, values: Any, num_samples: int | None = None) -> npt.NDArray[np.int64]:
    """Check that `values` are integers [N], one for each image, and give them as int64."""
    column = _array(name, what, values)
    wanted = "N" if num_samples is None else num_samples
    if column.dtype.kind not in "iu" or column.ndim != 1 or num_samples not in (None, len(column)):
        raise DataError(
            f"data set {name}: {what} must be integers [{wanted}], one for each image, "
            f"found {column.dtype} {list(column.shape)}."
        )
    if not len(column):
        raise DataError(f"data set {name} has no sample: wanted at least one.")
    if column.dtype.kind == "u" and int(column.max()) > np.iinfo(np.int64).max:
        raise DataError(f"data set {name}: {what} must fit int64, found {int(column.max())}.")
    return column.astype(np.int64)


def _pixels(name: str, images: Any) -> Pixels:
    array = _array(name, "images", images)
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise DataError(f"data set {name}: images must be uint8 (0..255), found {array.dtype} {shape}.")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4 or shape[3] not in (1, 3):
        channels_first = array.ndim == 4 and shape[1] in (1, 3)
        advice = " Channels come last: move axis 1 to the end." if channels_first else ""
        raise DataError(
            f"data set {name}: images must be [N, H, W] or [N, H, W, C] with C 1 or 3, found {shape}.{advice}"
        )
    return np.moveaxis(array, 3, 1)


def _array(name: str, what: str, values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        return values
    raise DataError(f"data set {name}: {what} must be a numpy array or a tensor, found {type(values).__name__}.")
