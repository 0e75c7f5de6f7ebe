"""Sample selection takes the exact fraction in batch order; weights have mean 1."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loss_inputs import LABELS, TEACHER_LOGITS, drawn

from kdpipe.stages.losses.sample_selection import SampleSelection, compute_sample_weights, select_samples
from kdpipe.stages.targets.outputs import DenseTargets

WEIGH = ("entropy", "certainty", "correctness")


def teacher(logits):
    return DenseTargets(logits, {})


@given(st.integers(1, 100), st.integers(1, 300))
def test_fraction_is_rounded_up_exactly(percent, num_samples):
    """0.07 * 100 is 7.000000000000001 in float64, but 7 samples."""
    config = SampleSelection(filter="hard", fraction=percent / 100)
    found = select_samples(config, teacher(torch.zeros(num_samples, 2)), torch.zeros(num_samples, dtype=torch.int64))
    assert len(found) == ceil(Fraction(percent, 100) * num_samples)


def test_the_smallest_share_is_one_sample():
    config = SampleSelection(filter="hard", fraction=1e-9)
    given_least = TEACHER_LOGITS.softmax(1)[torch.arange(8), LABELS].argmin()
    assert select_samples(config, teacher(TEACHER_LOGITS), LABELS).tolist() == [given_least]


def test_selection_keeps_batch_order_and_takes_first_of_ties():
    logits = torch.zeros(6, 3)
    logits[:, 0] = torch.tensor([2.0, -1.0, 2.0, -3.0, 2.0, -1.0])
    labels = torch.zeros(6, dtype=torch.int64)
    for share, expected in ((1 / 6, [3]), (0.5, [1, 3, 5]), (4 / 6, [0, 1, 3, 5]), (1.0, list(range(6)))):
        assert (
            select_samples(SampleSelection(filter="hard", fraction=share), teacher(logits), labels).tolist() == expected
        )


def test_all_samples_and_equal_weights_return_none():
    assert select_samples(SampleSelection(), teacher(TEACHER_LOGITS), LABELS) is None
    assert compute_sample_weights(SampleSelection(), teacher(TEACHER_LOGITS), LABELS) is None


@pytest.mark.parametrize("weighting", WEIGH)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 100.0, 1e4])
def test_weights_are_finite_nonnegative_and_of_mean_one(weighting, scale):
    """A teacher that is certain of everything, or of nothing, gives no weights."""
    found = compute_sample_weights(
        SampleSelection(weighting=weighting), teacher((scale * drawn(8, 10, seed=3)).float()), LABELS
    )
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert found.mean().item() == pytest.approx(1.0, rel=1e-5) or found.abs().max() == 0


@pytest.mark.parametrize("weighting", WEIGH)
def test_single_sample_has_weight_one(weighting):
    found = compute_sample_weights(SampleSelection(weighting=weighting), teacher(TEACHER_LOGITS[:1]), LABELS[:1])
    assert found.tolist() == pytest.approx([1.0])
