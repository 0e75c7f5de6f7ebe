"""Multi-level logit distillation matches the reference code, summed over temperatures."""

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, drawn, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.logits import mlld
from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.losses.logits.mlld import MLLD, batch_relation, class_relation, mlld_loss

STUDENT, TEACHER = (STUDENT_LOGITS / 4).softmax(1), (TEACHER_LOGITS / 4).softmax(1)


def test_relations_match_the_reference_code():
    assert class_relation(STUDENT, TEACHER).item() == pytest.approx(0.0125883948734, rel=1e-11)
    assert batch_relation(STUDENT, TEACHER).item() == pytest.approx(0.003392254161, rel=1e-9)


def test_at_one_temperature_it_is_kd_and_both_relations():
    loss = mlld_loss(STUDENT_LOGITS, TEACHER_LOGITS, 4.0)
    assert loss.item() == pytest.approx(8.079470496 + 0.0125883948734 + 0.003392254161, rel=1e-9)


def test_the_relations_are_what_loops_give():
    classes = sum(
        (STUDENT[:, i] @ STUDENT[:, j] - TEACHER[:, i] @ TEACHER[:, j]) ** 2 for i in range(10) for j in range(10)
    )
    samples = sum((STUDENT[i] @ STUDENT[j] - TEACHER[i] @ TEACHER[j]) ** 2 for i in range(8) for j in range(8))
    assert class_relation(STUDENT, TEACHER).item() == pytest.approx(classes.item() / 10, rel=1e-12)
    assert batch_relation(STUDENT, TEACHER).item() == pytest.approx(samples.item() / 8, rel=1e-12)


def test_the_term_is_the_sum_over_its_temperatures():
    loss = MLLD(loss="mlld", temperature_list=(2.0, 5.0)).build({}, {}, DATASET)(make_inputs())
    assert loss.shape == ()
    expected = mlld_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0) + mlld_loss(STUDENT_LOGITS, TEACHER_LOGITS, 5.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_defaults_match_the_reference_code():
    config = MLLD(loss="mlld")
    assert config.weight == 1
    assert config.temperatures() == (2, 3, 4, 5, 6)
    assert (config.per_sample, config.one_label, config.on_logits) == (False, False, True)


@pytest.mark.parametrize("wrong", [(), (4.0, 0.0)])
def test_no_temperature_and_one_of_zero_are_refused(wrong):
    with pytest.raises(RecipeError, match="temperature_list"):
        MLLD(loss="mlld", temperature_list=wrong)


def test_the_relations_go_over_the_batch_of_all_processes(monkeypatch):
    waiting = iter([STUDENT, TEACHER])
    monkeypatch.setattr(
        mlld, "all_gather_with_grad", lambda rows: next(waiting, rows)
    )  # behind them, each sample's own part
    loss = mlld_loss(STUDENT_LOGITS[:4], TEACHER_LOGITS[:4], 4.0)
    instance = kd_loss(STUDENT_LOGITS[:4], TEACHER_LOGITS[:4], 4.0).mean()
    assert (loss - instance).item() == pytest.approx(0.0125883948734 + 0.003392254161, rel=1e-9)


def test_gradient_matches_finite_differences():
    logits = STUDENT_LOGITS[:4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mlld_loss(z, TEACHER_LOGITS[:4, :5], 2.0), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_saturated_logits_are_finite_in_every_precision(dtype, num_samples):
    ends = torch.tensor([[300.0, -300, 0], [-300, 300, 0], [300, -300, 0]])[:num_samples]
    student = ends.to(dtype, copy=True).requires_grad_()
    loss = MLLD(loss="mlld").build({}, {}, DATASET)(make_inputs(student, ends.flip(1), labels=torch.zeros(num_samples)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_zero_and_flat_at_agreement():
    logits = TEACHER_LOGITS.clone().requires_grad_()
    loss = mlld_loss(logits, TEACHER_LOGITS, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


def test_many_classes_give_the_value_of_the_class_matrix(monkeypatch):
    expected = class_relation(STUDENT, TEACHER).item()
    monkeypatch.setattr(mlld, "MAX_RELATIONS", 99)
    assert class_relation(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)
    assert class_relation(STUDENT.float(), STUDENT.float()).item() == 0


def test_imagenet_21k_needs_no_class_matrix():
    logits = drawn(2, 21843, seed=5).float()
    with torch.profiler.profile(profile_memory=True) as profile:
        mlld_loss(logits, logits.flip(0))
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 100 * 2 * 21843 * 8
