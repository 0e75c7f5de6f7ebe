"""Standardized logits match the reference code's KD, and are finite for constant logits."""

import pytest
import torch
from support.loss_inputs import STUDENT_LOGITS, TEACHER_LOGITS, drawn

from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.losses.weighted import standardize_logits
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.outputs import DenseTargets, TransformedTargets


def test_kd_of_standardized_logits_matches_the_reference():
    loss = kd_loss(standardize_logits(STUDENT_LOGITS), standardize_logits(TEACHER_LOGITS), 2.0).mean()
    assert loss.item() == pytest.approx(0.9645054502, rel=1e-9)


def test_rows_have_mean_zero_and_deviation_one_at_any_scale():
    logits = 50 * STUDENT_LOGITS - 1000
    rows = standardize_logits(logits)
    assert rows.mean(1).abs().max() < 1e-12
    assert torch.allclose(rows.std(1), torch.ones(8, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(rows, standardize_logits(STUDENT_LOGITS), rtol=1e-6)


def test_only_the_teachers_logits_are_standardized():
    feature = FeatureSpec("layer3")
    inner = DenseTargets(TEACHER_LOGITS, {feature: drawn(8, 4, seed=1)})
    outputs = TransformedTargets(inner, lambda logits, _: standardize_logits(logits))
    assert torch.equal(outputs.logits_at(2.0), standardize_logits(TEACHER_LOGITS))
    assert torch.equal(outputs.features[feature], inner.features[feature])
    index = torch.tensor([5, 2])
    assert torch.equal(outputs.rows(index).logits_at(2.0), standardize_logits(TEACHER_LOGITS)[index])
    assert torch.equal(outputs.rows(index).features[feature], inner.features[feature][index])


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(standardize_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 300.1, -299.7])
def test_constant_rows_give_zeros_without_a_gradient(dtype, value):
    logits = STUDENT_LOGITS.to(dtype).clone()
    logits[3] = value
    logits.requires_grad_()
    rows = standardize_logits(logits)
    kd_loss(rows, standardize_logits(TEACHER_LOGITS), 2.0).mean().backward()
    assert rows[3].abs().max() == 0
    assert logits.grad[3].abs().max() == 0
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[2].abs().max() > 0


def test_one_class_gives_zeros():
    logits = torch.tensor([[3.0], [-5.0]], requires_grad=True)
    rows = standardize_logits(logits)
    rows.sum().backward()
    assert rows.tolist() == [[0], [0]]
    assert logits.grad.tolist() == [[0], [0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_logits_are_standardized_in_float32(dtype):
    logits = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
    rows = standardize_logits(logits)
    rows[0, 0].backward()
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[pytest.approx(1), pytest.approx(-1), pytest.approx(0, abs=1e-6)]]
    assert torch.isfinite(logits.grad).all()
