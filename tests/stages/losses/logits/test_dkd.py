"""DKD matches the reference code, is exact at saturated logits, and has a warm-up."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import DATASET, LABELS, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses.logits.dkd import DKD, dkd_loss, nckd_loss, tckd_loss, without_label
from kdpipe.stages.losses.schedules import FINISHED, TrainProgress, warmup_factor

ENDS = torch.tensor([[1.0, -1, 0, 0.5], [-1, 1, 0.25, 0], [0, 0.5, 1, -1]], dtype=torch.float64)


def test_dkd_matches_the_reference_code():
    loss = dkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 4.0, alpha=1.0, beta=8.0).mean()
    assert loss.item() == pytest.approx(62.06831042, rel=1e-9)


def test_parts_match_the_reference_code_times_t_squared():
    target = tckd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 4.0)
    others = nckd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 4.0)
    assert target.shape == others.shape == (8,)
    assert target.mean().item() == pytest.approx(1.28614269549, rel=1e-11)
    assert others.mean().item() == pytest.approx(7.59777096495, rel=1e-11)


def test_kd_is_dkd_with_the_teachers_beta():
    """Equation 4 of the paper: KD = TCKD + (1 - p_t of the label) NCKD."""
    target = tckd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 2.0)
    others = nckd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 2.0)
    log_student, log_teacher = ((z / 2).log_softmax(1) for z in (STUDENT_LOGITS, TEACHER_LOGITS))
    kd = 4 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    rest = 1 - log_teacher.exp()[torch.arange(8), LABELS]
    assert torch.allclose(target + rest * others, kd, rtol=1e-12)


def test_without_label_keeps_the_order():
    logits = torch.arange(12.0).view(3, 4)
    others = without_label(logits, torch.tensor([0, 2, 3]))
    assert others.tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]


def test_module_equals_the_function_per_sample():
    config = DKD(loss="dkd", alpha=0.5, beta=3.0, temperature=2.0)
    each = config.build({}, {}, DATASET)(make_inputs())
    assert each.shape == (8,)
    expected = dkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, 2.0, alpha=0.5, beta=3.0).mean()
    assert each.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    rows = zip(STUDENT_LOGITS.split(1), TEACHER_LOGITS.split(1), LABELS.split(1), strict=True)
    alone = [dkd_loss(student, teacher, label, 2.0, alpha=0.5, beta=3.0).mean() for student, teacher, label in rows]
    assert torch.allclose(each, torch.stack(alone), rtol=1e-12)


def test_defaults_match_the_reference_code():
    config = DKD(loss="dkd")
    assert (config.weight, config.alpha, config.beta, config.temperature, config.warmup_epochs) == (1, 1, 8, 4, 20)
    assert config.temperatures() == (4.0,)
    assert (config.one_label, config.per_sample, config.on_logits) == (True, True, True)


def test_warmup_grows_to_the_full_loss():
    module = DKD(loss="dkd").build({}, {}, DATASET)
    whole = module(make_inputs(progress=FINISHED))
    assert whole.mean().item() == pytest.approx(62.06831042, rel=1e-9)
    assert torch.allclose(module(make_inputs(progress=TrainProgress(0, 240))), whole / 20)
    assert torch.allclose(module(make_inputs(progress=TrainProgress(9, 240))), whole / 2)
    assert torch.equal(module(make_inputs(progress=TrainProgress(19, 240))), whole)
    assert torch.equal(module(make_inputs(progress=TrainProgress(100, 240))), whole)


def test_warmup_factor_without_warmup_is_one():
    assert warmup_factor(0, TrainProgress(0, 240)) == warmup_factor(0, FINISHED) == 1
    assert warmup_factor(1, TrainProgress(0, 240)) == 1
    assert warmup_factor(20, TrainProgress(math.inf, 1)) == 1


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: dkd_loss(z, TEACHER_LOGITS, LABELS, 4.0, alpha=1.0, beta=8.0).mean(), logits
    )


@pytest.mark.parametrize("scale", [120.0, 300.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_saturated_logits_match_float64(scale, temperature):
    labels = torch.tensor([0, 0, 3])
    results = []
    for dtype in (torch.float32, torch.float64):
        student = (scale * ENDS).to(dtype).requires_grad_()
        teacher = (scale * ENDS.flip(1)).to(dtype)
        parts = [part(student, teacher, labels, temperature) for part in (tckd_loss, nckd_loss)]
        gradients = [torch.autograd.grad(part.sum(), student)[0] for part in parts]
        results.append([part.double() for part in (*parts, *gradients)])
    for narrow, wide in zip(*results, strict=True):
        assert torch.isfinite(narrow).all()
        assert torch.allclose(narrow, wide, rtol=1e-5, atol=1e-5)


def test_saturated_logits_match_a_loop_over_the_classes():
    student, teacher, labels = 120 * ENDS, 120 * ENDS.flip(0), [0, 1, 2]
    expected = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        others = [c for c in range(4) if c != label]
        log_s, log_t = (_log_softmax([z[c] for c in others]) for z in (s, t))
        expected.append(sum(math.exp(b) * (b - a) for a, b in zip(log_s, log_t, strict=True)))
    given = nckd_loss(student.float(), teacher.float(), torch.tensor(labels), 1.0)
    assert given.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert max(expected) > 50


def _log_softmax(values):
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_student_is_finite_in_any_precision(dtype):
    student = (300 * ENDS).to(dtype).requires_grad_()
    loss = dkd_loss(student, 300 * ENDS.flip(1).float(), torch.tensor([0, 1, 3]), 1.0, alpha=1.0, beta=8.0).mean()
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert loss > 100
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("part", [tckd_loss, nckd_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_student_is_summed_in_float32(part, dtype):
    student = STUDENT_LOGITS.to(dtype)
    narrow = part(student, TEACHER_LOGITS.float(), LABELS, 3.0)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), part(student.double(), TEACHER_LOGITS, LABELS, 3.0), rtol=1e-4, atol=1e-5)


def test_zero_and_flat_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    loss = dkd_loss(logits, TEACHER_LOGITS, LABELS, 4.0, alpha=1.0, beta=8.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


def test_two_classes_leave_nothing_to_say_about_the_others():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    student = STUDENT_LOGITS[:, :2].float().requires_grad_()
    others = nckd_loss(student, TEACHER_LOGITS[:, :2].float(), labels, 4.0)
    others.sum().backward()
    assert others.abs().max() == 0
    assert student.grad.abs().max() == 0
