from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.stages.data.splits import stratified_split, stratified_subset, validation_split
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


def _ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(10**6, count, replace=False)


@given(LABELS, SHARES, st.integers(0, 5))
def test_validation_is_disjoint_complete_and_stratified(labels: list[int], share: float, seed: int) -> None:
    column = _with_a_pair(labels)
    train, validation = validation_split(column, _ids(len(column), seed), share)
    assert sorted([*train, *validation]) == list(range(len(column)))
    assert list(train) == sorted(train) and list(validation) == sorted(validation)
    for label in np.unique(column):
        left, taken = np.sum(column[train] == label), np.sum(column[validation] == label)
        assert left >= 1 and taken >= (left + taken >= 2)
        assert taken == min(max(int(share * (left + taken) + 0.5), left + taken >= 2), left + taken - 1)


@given(LABELS, SHARES, st.randoms(use_true_random=False))
def test_validation_depends_on_ids_and_not_on_their_order(labels: list[int], share: float, random: Random) -> None:
    column, order = _with_a_pair(labels), list(range(len(labels) + 2))
    random.shuffle(order)
    ids = _ids(len(column), 0)
    first, second = (ids[rows][validation_split(column[rows], ids[rows], share)[1]] for rows in (slice(None), order))
    assert sorted(first) == sorted(second)


def test_validation_mostly_stays_where_samples_are_added() -> None:
    labels, ids = np.arange(2000) % 4, _ids(2000, 0)
    few, more = (set(ids[:count][validation_split(labels[:count], ids[:count], 0.2)[1]]) for count in (1800, 2000))
    assert len(few & more) > 0.9 * len(few)


def test_validation_of_single_samples_is_refused() -> None:
    with pytest.raises(DataError, match="data.validation_share"):
        validation_split([0, 1, 2], [5, 6, 7], 0.5)
