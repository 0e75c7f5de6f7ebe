"""NKD matches the reference code, uses temperature 1 for the label, and is finite at the edges."""

from dataclasses import replace

import pytest
import torch
from support.loss_inputs import DATASET, LABELS, STUDENT_LOGITS, TEACHER_LOGITS, drawn, make_inputs

from kdpipe.stages.losses.logits.nkd import NKD, nkd_loss


def test_nkd_matches_the_reference_code():
    loss = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 1.0, gamma=1.5).mean()
    assert loss.item() == pytest.approx(9.330017147, rel=1e-9)


def naive(student, teacher, labels, temperature, gamma):
    total = 0.0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        total -= t.softmax(0)[label] * s.softmax(0)[label].log()
        others = [c for c in range(len(s)) if c != label]
        soft_s, soft_t = ((z[others] / temperature).softmax(0) for z in (s, t))
        total -= gamma * temperature**2 * sum(b * a.log() for a, b in zip(soft_s, soft_t, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (2.0, 0.5)])
def test_nkd_is_what_loops_over_samples_and_classes_give(temperature, gamma):
    expected = naive(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, temperature, gamma)
    loss = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, temperature, gamma=gamma).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_module_equals_the_function_per_sample():
    each = NKD(loss="nkd", gamma=0.5, temperature=2.0).build({}, {}, DATASET)(make_inputs())
    assert each.shape == (8,)
    expected = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 2.0, gamma=0.5).mean()
    assert each.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    first = nkd_loss(STUDENT_LOGITS[:1], TEACHER_LOGITS[:1], LABELS[:1], 2.0, gamma=0.5).mean()
    assert each[0].item() == pytest.approx(first.item(), rel=1e-12)


class Warm:
    """A teacher whose logits depend on the temperature, like those of a top-k store."""

    def logits_at(self, temperature):
        return TEACHER_LOGITS * temperature


def test_label_has_temperature_one_and_others_their_own():
    module = NKD(loss="nkd", temperature=2.0).build({}, {}, DATASET)
    each = module(replace(make_inputs(), teacher=Warm()))
    target = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 2.0, gamma=0.0).mean()
    others = nkd_loss(STUDENT_LOGITS, 2 * TEACHER_LOGITS, LABELS, 2.0, gamma=1.5).mean()
    others = others - nkd_loss(STUDENT_LOGITS, 2 * TEACHER_LOGITS, LABELS, 2.0, gamma=0.0).mean()
    assert each.mean().item() == pytest.approx((target + others).item(), rel=1e-12)


def test_defaults_match_the_reference_code():
    config = NKD(loss="nkd")
    assert (config.weight, config.gamma, config.temperature) == (1, 1.5, 1)
    assert NKD(loss="nkd", temperature=3.0).temperatures() == (1.0, 3.0)
    assert (config.one_label, config.per_sample, config.on_logits) == (True, True, True)


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nkd_loss(z, TEACHER_LOGITS, LABELS, 2.0, gamma=1.5).mean(), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_saturated_logits_match_float64(dtype, label):
    ends, labels = torch.tensor([[300.0, -300, 0, 150]]), torch.tensor([label])
    student = ends.to(dtype, copy=True).requires_grad_()
    loss = nkd_loss(student, ends.flip(1), labels, 1.0, gamma=1.5).mean()
    loss.backward()
    wide = ends.double().requires_grad_()
    expected = nkd_loss(wide, ends.flip(1).double(), labels, 1.0, gamma=1.5).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert torch.allclose(student.grad.double(), wide.grad, rtol=1e-2, atol=1e-5)


def test_other_classes_have_no_gradient_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    others = nkd_loss(logits, TEACHER_LOGITS, LABELS, 2.0, gamma=1.0).mean()
    others = others - nkd_loss(logits, TEACHER_LOGITS, LABELS, 2.0, gamma=0.0).mean()
    others.backward()
    assert logits.grad.abs().max() < 1e-12


def test_gradient_at_a_high_temperature_is_that_of_float64():
    gradients = []
    for dtype in (torch.float32, torch.float64):
        student = drawn(4, 100, seed=1).to(dtype).requires_grad_()
        nkd_loss(student, drawn(4, 100, seed=2).to(dtype), torch.arange(4), 1000.0).sum().backward()
        gradients.append(student.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
