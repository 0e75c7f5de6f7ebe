from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.stages.data.splits import stratified_split, stratified_subset
from kdpipe.stages.errors import DataError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
SHARES = st.floats(0.01, 0.99)


def _with_a_pair(labels: list[int]) -> np.ndarray:
    """At least one class has two samples, so that there can be a test split."""
    return np.array([*labels, 7, 7])


@given(LABELS, SHARES, st.integers(0, 2**40))
def test_every_sample_is_on_exactly_one_side(labels: list[int], share: float, seed: int) -> None:
    column = _with_a_pair(labels)
    train, test = stratified_split(column, share, seed)
    assert sorted([*train, *test]) == list(range(len(column)))
    assert list(train) == sorted(train) and list(test) == sorted(test)


@given(LABELS, SHARES)
def test_every_class_gives_its_share_and_stays_on_both_sides(labels: list[int], share: float) -> None:
    column = _with_a_pair(labels)
    train, test = stratified_split(column, share)
    for label in np.unique(column):
        in_train, in_test = np.sum(column[train] == label), np.sum(column[test] == label)
        count = in_train + in_test
        assert in_train >= 1
        assert in_test >= (count >= 2)
        assert abs(in_test - share * count) <= max(0.5, 1 - share * count, 1 - (1 - share) * count) + 1e-9


@given(LABELS, st.tuples(SHARES, SHARES))
def test_a_smaller_test_share_is_part_of_a_larger(labels: list[int], shares: tuple[float, float]) -> None:
    column = _with_a_pair(labels)
    small, large = (stratified_split(column, share)[1] for share in sorted(shares))
    assert set(small) <= set(large)


def test_split_of_a_class_does_not_depend_on_the_others() -> None:
    alone = stratified_split(np.zeros(50, dtype=np.int64), 0.3)[1]
    beside = stratified_split(np.repeat([0, 1, 2], 50), 0.3)[1]
    assert list(alone) == [row for row in beside if row < 50]


def test_another_seed_is_another_split() -> None:
    labels = np.zeros(100, dtype=np.int64)
    assert list(stratified_split(labels, 0.2, 0)[1]) != list(stratified_split(labels, 0.2, 1)[1])


def test_the_split_is_the_same_on_every_machine_and_numpy() -> None:
    train, test = stratified_split([0, 1, 0, 1, 0, 1, 0, 1, 0, 1], 0.4)
    assert list(train) == [1, 2, 3, 6, 8, 9]
    assert list(test) == [0, 4, 5, 7]


@given(LABELS, st.data())
def test_a_subset_is_stratified_and_part_of_every_larger_one(labels: list[int], data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.tuples(*[st.integers(1, len(labels))] * 2)))
    column = np.array(labels)
    subset = stratified_subset(column, small)
    assert len(set(subset)) == len(subset) == small
    assert list(subset) == sorted(subset)
    assert set(subset) <= set(stratified_subset(column, large))


@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_a_subset_of_balanced_classes_is_balanced(num_classes: int, each: int, data: st.DataObject) -> None:
    labels = np.tile(np.arange(num_classes), each)
    count = data.draw(st.integers(1, len(labels)))
    counts = np.bincount(labels[stratified_subset(labels, count)], minlength=num_classes)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        stratified_split([0, 0, 1, 1], share)


def test_classes_of_one_leave_no_test_split() -> None:
    with pytest.raises(DataError, match="none for the test split"):
        stratified_split([0, 1, 2], 0.5)


@pytest.mark.parametrize("count", [0, 5])
def test_a_subset_larger_than_the_split_is_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"a subset of {count} samples: the split has 4"):
        stratified_subset([0, 0, 1, 1], count)


@pytest.mark.parametrize("labels", [np.zeros(0, dtype=np.int64), np.zeros((2, 2), dtype=np.int64)])
def test_labels_are_one_row(labels: np.ndarray) -> None:
    with pytest.raises(DataError, match="must be one-dimensional and not empty"):
        stratified_split(labels, 0.2)
