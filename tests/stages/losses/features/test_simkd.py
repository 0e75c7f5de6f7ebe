"""SimKD's loss compares projected maps with the teacher's, pooling the larger."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import DATASET, STUDENT_HINTS, TEACHER_HINTS, drawn, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.targets.feature_spec import FeatureSpec, compute_statistic

CONFIG = SimKD(loss="simkd", layers=(("a", "b"),))


def per_sample(student, teacher):
    shape = tuple(student.shape[1:])
    (feature,) = CONFIG.required_features({"a": shape})
    given = compute_statistic(feature, teacher)
    module = CONFIG.build({"a": shape}, {feature: tuple(given.shape[1:])}, DATASET)
    return module(make_inputs(student={"a": student}, teacher={feature: given}))


def test_it_is_the_mean_squared_error_of_maps_of_equal_shape():
    losses = per_sample(STUDENT_HINTS, TEACHER_HINTS)
    assert losses.shape == (8,)
    assert losses.mean().item() == pytest.approx(1.954606313, rel=1e-9)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8), (7, 5)])
def test_larger_map_is_pooled(student_size, teacher_size):
    student, teacher = drawn(3, 6, student_size, student_size, seed=1), drawn(3, 6, teacher_size, teacher_size, seed=2)
    size = min(student_size, teacher_size)
    expected = F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
    assert per_sample(student, teacher).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_teachers_map_is_required_at_the_students_size():
    assert CONFIG.required_features({"a": (16, 8, 8)}) == (FeatureSpec("b", size=(8, 8)),)


def test_gradient_matches_finite_differences():
    student, teacher = drawn(2, 3, 4, 4, seed=1).requires_grad_(), drawn(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda maps: per_sample(maps, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_edges(dtype):
    teacher = TEACHER_HINTS[:1].to(dtype)
    for student in (torch.zeros_like(teacher), teacher.clone()):
        student.requires_grad_()
        loss = per_sample(student, teacher).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
    assert loss.item() == 0


@pytest.mark.parametrize("teacher", [(16, 8, 4), (32, 8, 8), (16,)])
def test_mismatched_shapes_are_errors_with_both_shapes(teacher):
    (feature,) = CONFIG.required_features({"a": (16, 8, 8)})
    with pytest.raises(RecipeError) as refusal:
        CONFIG.build({"a": (16, 8, 8)}, {feature: teacher}, DATASET)
    assert "simkd cannot join the student's a" in str(refusal.value)
    assert "[16, 8, 8]" in str(refusal.value)
    assert str(list(teacher)) in str(refusal.value)


@pytest.mark.parametrize("layers", [(), (("a", "b"), ("c", "d"))])
def test_exactly_one_pair_is_required(layers):
    with pytest.raises(RecipeError):
        SimKD(loss="simkd", layers=layers)


def test_defaults_are_the_papers():
    assert (CONFIG.weight, CONFIG.factor, CONFIG.needs_head) == (1, 2, True)
