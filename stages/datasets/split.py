"""The fixed stratified split and subset: pure functions of the labels, the same on every machine and numpy version."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from stages.errors import DataError

Split = Literal["train", "test"]
Rows = npt.NDArray[np.int64]

SPLIT_SEED = 0


def stratified_split(labels: npt.ArrayLike, share: float, seed: int = SPLIT_SEED) -> tuple[Rows, Rows]:
    """Split the positions of `labels` [N] into (train, test), both ascending; `share` of every class goes to test.

    A class of two or more samples is on both sides, a class of one is in train only. A smaller share's test
    samples are among those of a larger share. DataError if the share is not within (0, 1) or no test sample is left.
    """
    if not 0 < share < 1:
        raise DataError(f"the test share must lie between 0 and 1, found {share}.")
    shuffled = _shuffled_by_class(np.asarray(labels), seed)
    test = np.concatenate([rows[: _num_test(len(rows), share)] for rows in shuffled])
    train = np.concatenate([rows[_num_test(len(rows), share) :] for rows in shuffled])
    if not len(test):
        raise DataError(
            f"no class has more than one of the {len(train)} samples, which leaves none for the test split: "
            "add samples, or bring a test split of your own."
        )
    return np.sort(train), np.sort(test)


def stratified_subset(labels: npt.ArrayLike, count: int, seed: int = SPLIT_SEED) -> Rows:
    """`count` positions of `labels` [N], ascending, every class in proportion to its size.

    A smaller subset is part of every larger one. DataError if `count` is not within 1..N.
    """
    labels = np.asarray(labels)
    if not 1 <= count <= len(labels):
        raise DataError(f"a subset of {count} samples was asked for, but the split has {len(labels)}.")
    shuffled = _shuffled_by_class(labels, seed)
    # The place (k + 1/2) / n of the k-th sample of a class of n: taking the lowest places first is Webster's
    # method, which gives every class its fair number at every count. Ties go to the lower label.
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in shuffled])
    first = np.argsort(places, kind="stable")[:count]
    return np.sort(np.concatenate(shuffled)[first])


def _num_test(num_samples: int, share: float) -> int:
    if num_samples < 2:
        return 0
    return min(max(math.floor(share * num_samples + 0.5), 1), num_samples - 1)


def _shuffled_by_class(labels: npt.NDArray[np.int64], seed: int) -> list[Rows]:
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"labels must be one row of at least one label, found the shape {list(labels.shape)}.")
    return [_shuffled(np.flatnonzero(labels == label), seed, int(label)) for label in np.unique(labels)]


def _shuffled(rows: npt.NDArray[np.intp], seed: int, label: int) -> Rows:
    # The raw words of a bit generator never change between numpy versions; Generator.permutation may.
    key = np.array([seed % 2**64, label % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(len(rows))
    return rows[np.argsort(words, kind="stable")].astype(np.int64)
