"""Intervals and tests of accuracies, against scipy.stats."""

import numpy as np
import pytest
from scipy import stats

from kdpipe.stages.evaluation.intervals import (
    Outcome,
    _over_images,
    accuracy_interval,
    difference,
    mcnemar,
    t_interval,
    wilson,
)


def outcome(correct, images="same"):
    correct = np.asarray(correct, dtype=bool)
    return Outcome(float(correct.mean()), len(correct), correct, images)


@pytest.mark.parametrize(("right", "num"), [(0, 10), (9, 10), (10, 10), (57, 60), (9876, 10_000)])
def test_wilson_is_that_of_scipy(right, num):
    expected = stats.binomtest(right, num).proportion_ci(method="wilson")
    found = wilson(right / num, num)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 4), (12, 30), (4, 4)])
def test_mcnemar_is_the_exact_sign_test_of_scipy(gained, lost):
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize("values", [(0.1, 0.2), (0.01, -0.02, 0.03, 0.011)])
def test_t_interval_is_that_of_scipy(values):
    expected = stats.ttest_1samp(values, 0)
    found, p = t_interval(values)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert p == pytest.approx(expected.pvalue)
    assert t_interval((0.1, 0.1))[1] == 0 and t_interval((0.0, 0.0))[1] == 1


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_paired_interval_is_about_that_of_the_bootstrap(num_seeds):
    rng = np.random.default_rng(0)
    first = rng.random((num_seeds, 2000)) < 0.8
    second = np.where(rng.random((num_seeds, 2000)) < 0.1, ~first, first)
    gained = (second.astype(float) - first).mean(0)
    found, p = _over_images(gained, num_seeds)
    expected = stats.bootstrap((gained,), np.mean, n_resamples=2000, rng=1, method="percentile").confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    both = difference(list(map(outcome, first)), list(map(outcome, second)))
    assert both.paired and both.value == pytest.approx(gained.mean())
    if num_seeds == 1:
        assert both.p == p == mcnemar(int((gained > 0).sum()), int((gained < 0).sum()))
    else:
        assert p == pytest.approx(stats.ttest_1samp(gained, 0).pvalue, rel=0.05)


def test_paired_interval_is_narrower_than_the_unpaired_one():
    first = np.arange(500) < 400
    second = np.arange(500) < 415  # the same images, and 15 more
    paired = difference([outcome(first)], [outcome(second)])
    unpaired = difference([outcome(first)], [outcome(second, "others")])
    assert paired.is_clear and not unpaired.is_clear
    assert unpaired.p is None and not unpaired.paired
    assert unpaired.interval.low < paired.interval.low < paired.value < paired.interval.high < unpaired.interval.high


def test_newcombe_matches_his_example():
    """Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10."""
    found = difference([Outcome(48 / 80, 80)], [Outcome(56 / 70, 70)])
    assert (found.interval.low, found.interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_no_changed_image_is_no_certainty():
    same = outcome(np.arange(60) < 50)
    found = difference([same], [same])
    assert found.interval.low < 0 < found.interval.high
    assert found.p == 1 and not found.is_clear


def test_the_wider_of_both_intervals_counts():
    """Seeds that agree do not make 60 images more, and many images do not make seeds agree."""
    few = [outcome(np.arange(60) < right) for right in (40, 40, 40)]
    assert accuracy_interval(few).over == "images"
    more = [outcome(np.arange(60) < right) for right in (42, 42, 42)]
    assert difference(few, more).interval.over == "images"
    assert not difference(few, more).is_clear
    many = [outcome(np.arange(50_000) < right) for right in (40_000, 41_000)]
    assert accuracy_interval(many).over == "seeds"
    assert difference(many, many[::-1]).interval.over == "seeds"


def test_one_teacher_meets_the_students_of_all_seeds():
    teacher = outcome(np.arange(100) < 90)
    students = [outcome(np.arange(100) < right) for right in (60, 70)]
    found = difference(students, [teacher])
    assert found.value == pytest.approx(0.25) and found.num_seeds == 2
    assert difference([teacher], students).value == pytest.approx(-0.25)
    with pytest.raises(ValueError):
        difference(students, [teacher] * 3)


def test_nothing_is_clear_without_the_number_of_images():
    found = difference([Outcome(0.1)], [Outcome(0.9)])
    assert found.interval is None and not found.is_clear
    assert accuracy_interval([Outcome(0.5)]) is None
