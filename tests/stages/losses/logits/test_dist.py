"""DIST matches the reference code, and is finite for constant rows and columns."""

import numpy as np
import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, drawn, make_inputs

from kdpipe.stages.losses.logits import dist
from kdpipe.stages.losses.logits.dist import DIST, dist_loss


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 2.099816725), (4.0, 34.7221359505)])
def test_dist_matches_the_reference_code(temperature, expected):
    loss = dist_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature, beta=1.0, gamma=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-7)  # without its eps of 1e-8


def test_parts_match_numpys_correlations():
    student, teacher = ((z / 2).softmax(1).numpy() for z in (STUDENT_LOGITS, TEACHER_LOGITS))
    rows = np.mean([1 - np.corrcoef(student[i], teacher[i])[0, 1] for i in range(8)])
    columns = np.mean([1 - np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(10)])
    loss = dist_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0, beta=0.5, gamma=3.0)
    assert loss.item() == pytest.approx(4 * (0.5 * rows + 3 * columns), rel=1e-6)


def test_module_equals_the_function_for_the_whole_batch():
    loss = DIST(loss="dist", beta=0.5, gamma=2.0, temperature=1.0).build({}, {}, DATASET)(make_inputs())
    assert loss.shape == ()
    assert loss.item() == dist_loss(STUDENT_LOGITS, TEACHER_LOGITS, 1.0, beta=0.5, gamma=2.0).item()


def test_defaults_match_the_reference_code():
    config = DIST(loss="dist")
    assert (config.weight, config.beta, config.gamma, config.temperature) == (2, 1, 1, 4)
    assert config.temperatures() == (4.0,)
    assert (config.per_sample, config.one_label, config.on_logits) == (False, False, True)


def test_the_columns_go_over_the_batch_of_all_processes(monkeypatch):
    whole = [STUDENT_LOGITS, TEACHER_LOGITS]
    shards = [(STUDENT_LOGITS[:4], TEACHER_LOGITS[:4]), (STUDENT_LOGITS[4:], TEACHER_LOGITS[4:])]
    losses = []
    for student, teacher in shards:
        waiting = iter(whole)
        monkeypatch.setattr(dist, "all_gather_with_grad", lambda rows, waiting=waiting: next(waiting))
        losses.append(dist_loss(student, teacher, 1.0, beta=1.0, gamma=1.0))
    assert torch.stack(losses).mean().item() == pytest.approx(2.099816725, rel=1e-7)


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS[:4, :5].clone().requires_grad_()
    teacher = TEACHER_LOGITS[:4, :5]
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, 4.0, beta=1.0, gamma=2.0), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batch_of_one_has_no_column_gradient(dtype):
    student = STUDENT_LOGITS[:1].to(dtype).requires_grad_()
    columns = dist_loss(student, TEACHER_LOGITS[:1].to(dtype), 1.0, beta=0.0, gamma=1.0)
    columns.backward()
    assert columns.item() == 1
    assert student.grad.abs().max() == 0
    both = dist_loss(student, TEACHER_LOGITS[:1].to(dtype), 1.0, beta=1.0, gamma=1.0)
    both.backward()
    assert torch.isfinite(both)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_saturated_logits_are_finite_in_every_precision(dtype, num_samples):
    ends = torch.tensor([[300.0, -300, 0], [-300, 300, 0], [300, -300, 0]])[:num_samples]
    student = ends.to(dtype, copy=True).requires_grad_()
    loss = dist_loss(student, ends.flip(1), 1.0, beta=1.0, gamma=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_constant_rows_and_columns_have_zero_correlation():
    student = torch.zeros(4, 5, requires_grad=True)
    loss = dist_loss(student, drawn(4, 5, seed=11).float(), 1.0, beta=1.0, gamma=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2)
    assert torch.isfinite(student.grad).all()


def test_zero_and_flat_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    loss = dist_loss(logits, TEACHER_LOGITS, 4.0, beta=1.0, gamma=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert logits.grad.abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1000.0])
def test_a_perfect_student_is_not_charged_at_many_classes(temperature):
    logits = drawn(2, 21843, seed=3).float()
    assert dist_loss(logits, logits.clone(), temperature).item() == pytest.approx(0, abs=1e-6)


def test_probabilities_that_underflow_have_a_finite_gradient():
    logits = drawn(4, 21843, seed=3).float().requires_grad_()
    dist_loss(logits, drawn(4, 21843, seed=4).float(), 0.01).backward()
    assert torch.isfinite(logits.grad).all()
