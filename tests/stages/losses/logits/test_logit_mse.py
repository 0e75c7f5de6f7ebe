"""Mean squared error of raw logits, the limit of KD at high temperatures."""

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses.logits.kd import LogitMSE, kd_loss, logit_mse_loss


def test_it_is_the_mean_over_samples_and_classes():
    pairs = zip(STUDENT_LOGITS.flatten().tolist(), TEACHER_LOGITS.flatten().tolist(), strict=True)
    expected = sum((s - t) ** 2 for s, t in pairs) / 80
    assert logit_mse_loss(STUDENT_LOGITS, TEACHER_LOGITS).mean().item() == pytest.approx(expected, rel=1e-12)


def test_kd_at_high_temperature_tends_to_half_of_it():
    """Hinton et al. 2015, equation 4."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (STUDENT_LOGITS, TEACHER_LOGITS))
    assert kd_loss(student, teacher, 1e4).mean().item() == pytest.approx(
        logit_mse_loss(student, teacher).mean().item() / 2, rel=1e-3
    )


def test_module_equals_the_function_per_sample():
    config = LogitMSE(loss="logit_mse")
    each = config.build({}, {}, DATASET)(make_inputs())
    assert each.shape == (8,)
    assert each.mean().item() == pytest.approx(logit_mse_loss(STUDENT_LOGITS, TEACHER_LOGITS).mean().item(), rel=1e-12)
    assert each[3].item() == pytest.approx(
        logit_mse_loss(STUDENT_LOGITS[3:4], TEACHER_LOGITS[3:4]).mean().item(), rel=1e-12
    )


def test_requires_all_logits_and_no_temperature():
    config = LogitMSE(loss="logit_mse")
    assert (config.weight, config.whole_logits, config.per_sample, config.on_logits) == (1, True, True, True)
    assert config.temperatures() == ()


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logit_mse_loss(z, TEACHER_LOGITS).mean(), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_of_any_precision_are_squared_in_float32(dtype):
    student = torch.tensor([[300.0, -300.0]], dtype=dtype, requires_grad=True)
    loss = logit_mse_loss(student, torch.tensor([[-300.0, 300.0]])).mean()
    loss.backward()
    assert loss.item() == 360_000  # float16 ends at 65,504
    assert student.grad.tolist() == [[600, -600]]


def test_zero_and_flat_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    loss = logit_mse_loss(logits, TEACHER_LOGITS).mean()
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
