"""Fixed stratified splits and subset: pure functions, the same on every machine and numpy version."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from kdpipe.stages.errors import DataError
from kdpipe.store import row_order

Split = Literal["train", "test"]
"""The splits that a source has."""

Part = Literal["train", "validation", "test"]
"""What is loaded: the validation images are cut from the training split."""

Indices = npt.NDArray[np.int64]

SPLIT_SEED = 0
VALIDATION_SEED = 1
VALIDATION: Literal["validation"] = "validation"


def stratified_split(labels: npt.ArrayLike, share: float, seed: int = SPLIT_SEED) -> tuple[Indices, Indices]:
    """Split the indices of `labels` [N] into (train, test), both ascending; `share` of every class goes to test.

    A class of two or more samples is in both, a class of one only in train. A smaller share's test samples are a
    subset of a larger share's.

    Raises:
        DataError: The share is not within (0, 1), or the test split would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"the test share must be between 0 and 1, found {share}.")
    shuffled = _shuffled_by_class(np.asarray(labels), seed)
    test = np.concatenate([rows[: _num_test(len(rows), share)] for rows in shuffled])
    train = np.concatenate([rows[_num_test(len(rows), share) :] for rows in shuffled])
    if not len(test):
        raise DataError(
            f"no class has more than one of the {len(train)} samples, which leaves none for the test split: "
            "add samples, or provide a test split."
        )
    return np.sort(train), np.sort(test)


def validation_split(labels: npt.ArrayLike, ids: npt.ArrayLike, share: float) -> tuple[Indices, Indices]:
    """Split the indices of samples, `labels` and unique `ids` [N], into (train, validation), both ascending.

    The share of every class goes to validation: the samples that come first by a hash of their id, whatever their
    order, so that few change sides where samples are added. A class of two or more samples is in both.

    Raises:
        DataError: The validation split would be empty.
    """
    labels, ids = np.asarray(labels), np.asarray(ids)
    hashed = row_order(ids, VALIDATION_SEED)
    by_class = [hashed[labels[hashed] == label] for label in np.unique(labels)]
    validation = np.concatenate([rows[: _num_test(len(rows), share)] for rows in by_class])
    if not len(validation):
        raise DataError(
            f"no class has more than one of the {len(labels)} training samples, which leaves none for "
            "data.validation_share: set it to 0, or add samples."
        )
    return np.setdiff1d(np.arange(len(labels)), validation), np.sort(validation).astype(np.int64)


def stratified_subset(labels: npt.ArrayLike, count: int, seed: int = SPLIT_SEED) -> Indices:
    """Return `count` indices of `labels` [N], ascending, with every class in proportion to its size.

    A smaller subset is part of every larger one. Raises DataError if `count` is not within 1..N.
    """
    labels = np.asarray(labels)
    if not 1 <= count <= len(labels):
        raise DataError(f"cannot take a subset of {count} samples: the split has {len(labels)}.")
    shuffled = _shuffled_by_class(labels, seed)
    # Rank (k + 1/2) / n for the k-th sample of a class of n: taking the lowest ranks first is Webster's method of
    # apportionment. Ties go to the lower label.
    ranks = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in shuffled])
    first = np.argsort(ranks, kind="stable")[:count]
    return np.sort(np.concatenate(shuffled)[first])


def _num_test(num_samples: int, share: float) -> int:
    if num_samples < 2:
        return 0
    return min(max(math.floor(share * num_samples + 0.5), 1), num_samples - 1)


def _shuffled_by_class(labels: npt.NDArray[np.int64], seed: int) -> list[Indices]:
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"labels must be one-dimensional and not empty, found the shape {list(labels.shape)}.")
    return [_shuffled(np.flatnonzero(labels == label), seed, int(label)) for label in np.unique(labels)]


def _shuffled(rows: npt.NDArray[np.intp], seed: int, label: int) -> Indices:
    # The raw words of a bit generator never change between numpy versions; Generator.permutation may.
    key = np.array([seed % 2**64, label % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(len(rows))
    return rows[np.argsort(words, kind="stable")].astype(np.int64)
