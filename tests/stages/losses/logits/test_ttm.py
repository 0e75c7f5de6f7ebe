"""TTM and WTTM against their formulas, in probabilities; and what KD has of them."""

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.losses.logits.ttm import TTM, WTTM, ttm_loss, wttm_loss


def formula(student, teacher, exponent):
    """Return the sum of the teacher's powers and the divergence, sample by sample."""
    powers = [probabilities**exponent for probabilities in teacher.softmax(1)]
    divergences = [
        sum(q * (q / p).log() for q, p in zip(power / power.sum(), one.softmax(0), strict=True))
        for power, one in zip(powers, student, strict=True)
    ]
    return torch.stack([power.sum() for power in powers]), torch.stack(divergences)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
def test_values_are_those_of_the_formula(exponent):
    sums, divergences = formula(STUDENT_LOGITS, TEACHER_LOGITS, exponent)
    torch.testing.assert_close(ttm_loss(STUDENT_LOGITS, TEACHER_LOGITS, exponent), divergences)
    torch.testing.assert_close(wttm_loss(STUDENT_LOGITS, TEACHER_LOGITS, exponent), sums * divergences)
    built = WTTM(exponent=exponent).build({}, {}, DATASET)(make_inputs())
    torch.testing.assert_close(built, sums * divergences)


def test_exponent_one_is_kd_at_temperature_one():
    torch.testing.assert_close(
        ttm_loss(STUDENT_LOGITS, TEACHER_LOGITS, 1.0), kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 1.0)
    )


def test_temperatures_and_defaults():
    assert (TTM().weight, TTM().exponent, WTTM().weight, WTTM().exponent) == (45.0, 0.1, 4.0, 0.2)
    assert (TTM().temperatures(), WTTM().temperatures()) == ((10.0,), (1.0, 5.0))


@pytest.mark.parametrize("function", [ttm_loss, wttm_loss])
def test_gradients_match_finite_differences(function):
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z, TEACHER_LOGITS, 0.2).mean(), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_logits_match_float64(dtype):
    ends = torch.tensor([[300.0, -300, 0, 150]], dtype=dtype)
    loss = wttm_loss(ends, ends.flip(1), 0.2)
    assert loss.item() == pytest.approx(wttm_loss(ends.double(), ends.flip(1).double(), 0.2).item(), rel=1e-5)
