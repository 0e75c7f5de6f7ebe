"""List the samples of a source before any pixel is decoded."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdpipe.stages.data.decode import Pixels
from kdpipe.stages.data.image_files import ImageFileList, ImageFiles
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.splits import Indices, Part
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from kdpipe.stages.errors import DataError, first_few

MAX_NUMBERED_CLASSES = 1_000_000
"""Limit for the number of classes inferred from the largest label, against typos."""


CHUNK = 256
"""Images that are copied at once."""


Targets = npt.NDArray[np.float32]
"""Labels (0 or 1) or numbers [N, K]; NaN where not known."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The samples of one split, or of a whole set without splits (`unsplit`).

    Attributes:
        labels: int64 [N]; of other tasks than classification 0, and -1 without any target.
        sample_ids: int64 [N].
        images: Images [N] to be scanned or scanned already, or a function from indices int64 [M] to pixels uint8
            [M, C, H, W].
        unsplit: Whether the set has no test split.
        notices: Sentences on what was left out, or was not plain.
        targets: Labels or numbers of each sample, float32 [N, K], named by `class_names`; None of classes.
    """

    name: str
    labels: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    images: ImageFileList | ImageFiles | Callable[[Indices], Pixels]
    unsplit: bool = False
    notices: tuple[str, ...] = ()
    targets: Targets | None = None


def list_arrays(
    name: str,
    images: Any,
    labels: Any,
    sample_ids: Any = None,
    *,
    class_names: tuple[str, ...] | None = None,
    unsplit: bool = False,
    notices: tuple[str, ...] = (),
    task: Task = CLASSIFICATION,
) -> Listing:
    """List images that are already in memory, as numpy arrays or torch tensors.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C].
        labels: Integer [N] or [N, 1]; of other tasks than classification numbers [N, K].
        sample_ids: Integer [N]; defaults to the positions.
        class_names: Defaults to "0", "1", ... up to the largest label, or the last of the K.

    Raises DataError for an array of another type or shape.
    """
    pixels = _pixels(name, images)
    targets = None if task == CLASSIFICATION else target_rows(name, task, labels, class_names, len(pixels))
    label_column = integer_column(name, "labels", labels, len(pixels)) if targets is None else has_target(targets)
    if class_names is None:
        class_names = numbered_classes(name, label_column) if targets is None else numbers(targets.shape[1])
    id_column = np.arange(len(pixels)) if sample_ids is None else sample_ids
    return Listing(
        name=name,
        labels=label_column,
        sample_ids=integer_column(name, "ids", id_column, len(pixels)),
        class_names=class_names,
        images=lambda indices: _taken(pixels, indices),
        unsplit=unsplit,
        notices=notices,
        targets=targets,
    )


def target_rows(
    name: str, task: Task, values: Any, names: Sequence[str] | None = None, num_samples: int | None = None
) -> Targets:
    """Check the labels (0 or 1) or numbers of samples, [N] or [N, K], and return them as float32 [N, K].

    NaN is one that is not known; so is -1 among labels.

    Args:
        name: The data set's name.
        task: MULTILABEL or REGRESSION.
        values: An array or tensor.
        names: The names of the K, if they are given.
        num_samples: N, if it is given.

    Raises:
        DataError: They are of another type, shape or range.
    """
    column = _array(name, "labels", values)
    rows = column[:, None] if column.ndim == 1 else column
    wanted = f"[{num_samples or 'N'}, {len(names) if names else 'K'}]"
    shapes_differ = rows.ndim != 2 or num_samples not in (None, len(rows)) or (names and rows.shape[1] != len(names))
    if column.dtype.kind not in "iufb" or shapes_differ or not rows.shape[1]:
        raise DataError(
            f"data set {name}: with data.task = {task!r} the labels must be numbers {wanted}, found {column.dtype} "
            f"{list(column.shape)}."
        )
    found = rows.astype(np.float32)
    if task == MULTILABEL:
        found[found == UNLABELED] = np.nan
    bad = np.isinf(found) if task == REGRESSION else ~(np.isnan(found) | (found == 0) | (found == 1))
    if bad.any():
        row, place = np.argwhere(bad)[0]
        raise DataError(
            f"data set {name}: label {names[place] if names else place} of the sample at position {row} is "
            f"{rows[row, place]}: with data.task = {task!r} it must be "
            + ("0 or 1, or -1 or NaN where it is not known." if task == MULTILABEL else "finite, or NaN if unknown.")
        )
    return found


def has_target(targets: Targets) -> npt.NDArray[np.int64]:
    """Return 0 for samples with any target, and -1 for others: int64 [N]."""
    return np.where(np.isnan(targets).all(1), UNLABELED, 0)


def numbers(count: int) -> tuple[str, ...]:
    """Return the names "0", "1", ..."""
    return tuple(map(str, range(count)))


def absent_classes(
    where: str,
    split: Part,
    labels: npt.NDArray[np.int64],
    class_names: tuple[str, ...],
    wanted: Container[str] | None,
    *,
    targets: Targets | None = None,
) -> tuple[str, ...]:
    """Return a notice if no sample of a split is of one of the classes, or has one of the labels; none otherwise.

    Args:
        where: The data set's name.
        split: The part that was loaded.
        labels: Its labels, int64 [N].
        class_names: The names of all classes.
        wanted: The classes to look for; None means all.
        targets: Labels or numbers, float32 [N, K]; None of classes.
    """
    if targets is not None:
        present = (targets != 0).any(0)  # labels that no sample has; a number that is always 0
    else:
        present = np.zeros(len(class_names), dtype=np.bool_)
        present[labels[(labels >= 0) & (labels < len(class_names))]] = True
    absent = [number for number in np.flatnonzero(~present) if wanted is None or class_names[number] in wanted]
    if not absent or not present.any():  # unlabeled samples are of any class
        return ()
    some = first_few([repr(class_names[number]) for number in absent])
    what = "classes have no sample" if targets is None else "labels are 0 in every sample"
    found = f"data set {where} ({split}): {len(absent)} of {len(class_names)} {what}: {some}."
    if split != "train":
        return (f"{found} Their accuracy is not measured.",)
    one_based = targets is None and absent == [0] and class_names[0] == "0" and wanted is None
    advice = " Labels count from 0, and here they start at 1: subtract 1." if one_based else ""
    return (f"{found}{advice or ' A network cannot learn them.'}",)


def unlabeled_samples(where: str, split: Part, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Return a notice if some samples, but not all, have no label (-1); none otherwise."""
    num = int((labels == UNLABELED).sum())
    some = f"data set {where} ({split}): {num:,} of {len(labels):,} samples have no label (-1)."
    return (some,) if 0 < num < len(labels) else ()


def refuse_shifted(where: str, labels: npt.NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    """Raise DataError if training labels seem to count from -1: a class would be taken for unlabeled samples.

    That is where classes have numbers for names, and about as many samples have the label -1 as a class has.
    """
    _, counts = np.unique(labels[labels != UNLABELED], return_counts=True)
    num = int((labels == UNLABELED).sum())
    is_numbered = class_names == tuple(map(str, range(len(class_names))))
    if is_numbered and len(counts) and labels.min() == UNLABELED and counts.min() <= 2 * num <= 4 * counts.max():
        raise DataError(
            f"data set {where}: {num:,} of {len(labels):,} training samples have the label -1, about as many as a "
            "class has. If the labels count from -1, add 1 to each; if these samples have no label, set data.labels = "
            f"{len(labels) - num} (in Python class_names=)."
        )


def numbered_classes(name: str, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Return the class names "0", "1", ... up to the largest label."""
    largest = int(labels.max())
    if largest >= MAX_NUMBERED_CLASSES:
        raise DataError(f"data set {name}: the label {largest} is too large: labels must be 0, 1, ... C - 1.")
    return tuple(str(label) for label in range(largest + 1))


def integer_column(name: str, what: str, values: Any, num_samples: int | None = None) -> npt.NDArray[np.int64]:
    """Check that `values` are integers [N], one for each image, and return them as int64."""
    column = _array(name, what, values)
    if column.ndim == 2 and column.shape[1] == 1:  # as MedMNIST and Keras have labels
        column = column[:, 0]
    expected = "N" if num_samples is None else num_samples
    if column.dtype.kind not in "iu" or column.ndim != 1 or num_samples not in (None, len(column)):
        raise DataError(
            f"data set {name}: {what} must be integers [{expected}], one for each image, "
            f"found {column.dtype} {list(column.shape)}.{other_tasks(what)}"
        )
    if not len(column):
        raise DataError(f"data set {name} has no samples: at least one is required.")
    if column.dtype.kind == "u" and int(column.max()) > np.iinfo(np.int64).max:
        raise DataError(f"data set {name}: {what} must fit int64, found {int(column.max())}.")
    return column.astype(np.int64)


def other_tasks(what: str = "labels") -> str:
    """Return advice for labels that are no classes."""
    advice = ' For several labels of an image set data.task = "multilabel", for numbers "regression".'
    return advice if what == "labels" else ""


def _taken(pixels: Pixels, indices: Indices) -> Pixels:
    """Return the pixels at `indices` in one new array; not all at once, which would take its memory twice."""
    taken = np.empty((len(indices), *pixels.shape[1:]), dtype=np.uint8)
    for start in range(0, len(indices), CHUNK):
        taken[start : start + CHUNK] = pixels[indices[start : start + CHUNK]]
    return taken


def _pixels(name: str, images: Any) -> Pixels:
    array = _array(name, "images", images)
    shape = list(array.shape)
    if array.dtype != np.uint8 or 0 in shape[1:]:
        raise DataError(f"data set {name}: images must be uint8 (0..255), no side 0, found {array.dtype} {shape}.")
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
