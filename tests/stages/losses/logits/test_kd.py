"""KD matches the reference codes in float64, and is finite at the edges."""

import pytest
import torch
from support.loss_inputs import STUDENT_LOGITS, TEACHER_LOGITS, drawn, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.logits.kd import KD, kd_loss
from kdpipe.stages.losses.schedules import Schedule, TrainProgress


@pytest.mark.parametrize(("temperature", "expected"), [(4.0, 8.079470496), (1.0, 4.635971995)])
def test_kd_matches_the_reference_code(temperature, expected):
    assert kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature).mean().item() == pytest.approx(expected, rel=1e-9)


def test_kd_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, TEACHER_LOGITS, 4.0).mean(), logits)


def test_kd_of_halves_averages_to_the_whole():
    halves = (
        kd_loss(STUDENT_LOGITS[:4], TEACHER_LOGITS[:4], 4.0).mean()
        + kd_loss(STUDENT_LOGITS[4:], TEACHER_LOGITS[4:], 4.0).mean()
    ) / 2
    assert halves.item() == pytest.approx(kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 4.0).mean().item())


def test_kd_is_zero_and_flat_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    loss = kd_loss(logits, TEACHER_LOGITS, 4.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kd_of_saturated_logits_is_finite_in_every_precision(dtype):
    student = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-300.0, 300.0, 0.0]], dtype=dtype), 1.0).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(600, rel=0.01)
    assert torch.isfinite(student.grad).all()


def test_module_uses_the_scheduled_temperature():
    config = KD(loss="kd", temperature=Schedule(start=8.0, end=2.0))
    module = config.build({}, {}, None)
    for epoch, temperature in ((0, 8.0), (3, 5.0), (6, 2.0)):
        loss = module(make_inputs(progress=TrainProgress(epoch, 7))).mean()
        assert loss.item() == pytest.approx(
            kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature).mean().item(), rel=1e-12
        )


@pytest.mark.parametrize("temperature", [25.0, 1000.0])
@pytest.mark.parametrize("num_classes", [10, 21843])
def test_a_high_temperature_gives_the_value_of_float64(temperature, num_classes):
    teacher = 2 * drawn(4, num_classes, seed=1)
    student = teacher + 1e-3 * drawn(4, num_classes, seed=2)
    losses = kd_loss(student.float(), teacher.float(), temperature)
    assert losses.dtype == torch.float32
    assert losses.min() >= 0
    assert losses.tolist() == pytest.approx(kd_loss(student, teacher, temperature).tolist(), rel=0.01)


@pytest.mark.parametrize("temperature", [1e-3, 1e4, 1e9])
def test_a_temperature_beyond_float32_is_refused(temperature):
    with pytest.raises(RecipeError, match=r"from 0.01 to 1,000"):
        KD(temperature=temperature)
