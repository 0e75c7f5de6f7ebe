"""Neuron selectivity transfer matches the reference code both ways, and is finite at the edges."""

from __future__ import annotations

import pytest
import torch
from support.loss_inputs import (
    DATASET,
    LARGER_STUDENT_MAPS,
    STUDENT_MAPS,
    TEACHER_MAPS,
    THEIR_TEACHER_MAPS,
    build_loss,
    drawn,
    loss_of_pair,
)

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.statistics.nst import NST, nst_from_channels, nst_from_gram, nst_loss
from kdpipe.stages.targets.feature_spec import MAP, SPATIAL_GRAM, FeatureSpec
from kdpipe.stages.targets.statistics import pool_to, spatial_gram

CONFIG = NST(loss="nst", layers=(("a", "b"),))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(STUDENT_MAPS, TEACHER_MAPS, 0.08043783546), (LARGER_STUDENT_MAPS, THEIR_TEACHER_MAPS, 0.178532368581)],
)
def test_nst_matches_the_reference_code(student, teacher, expected):
    assert loss_of_pair(CONFIG, student, teacher).item() == pytest.approx(expected, rel=1e-9)


def naive(student, teacher):
    """The paper's double sums over channels, of one sample."""
    own, other = [[each.flatten() / each.norm() for each in maps] for maps in (student, teacher)]

    def mean_kernel(some, others):
        return sum((x @ y) ** 2 for x in some for y in others) / (len(some) * len(others))

    return mean_kernel(other, other) + mean_kernel(own, own) - 2 * mean_kernel(own, other)


@pytest.mark.parametrize("shape", [(3, 4, 2), (9, 2, 2)])
def test_both_routes_give_the_double_sums_over_channels(shape):
    channels, height, width = shape
    student, teacher = drawn(2, channels, height, width, seed=1), drawn(2, 5, height, width, seed=2)
    expected = torch.stack([naive(own, other) for own, other in zip(student, teacher, strict=True)])
    for found in (
        nst_from_channels(student, teacher),
        nst_from_gram(student, spatial_gram(teacher)),
        nst_loss(student, teacher),
    ):
        assert torch.allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(3, 4, 2), (9, 2, 2)])
def test_gradient_matches_finite_differences(shape):
    student, teacher = drawn(2, *shape, seed=1).requires_grad_(), drawn(2, 5, *shape[1:], seed=2)
    assert torch.autograd.gradcheck(lambda maps: nst_loss(maps, teacher).mean(), student)


def test_small_maps_need_the_gram_and_large_ones_the_map():
    assert CONFIG.required_features({"a": (16, 16, 16)}) == (FeatureSpec("b", SPATIAL_GRAM, (16, 16)),)
    assert CONFIG.required_features({"a": (16, 32, 32)}) == (FeatureSpec("b", MAP, (32, 32)),)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (drawn(3, 4, 8, 8, seed=1), drawn(3, 6, 8, 8, seed=2)),
        (drawn(3, 4, 16, 8, seed=1), drawn(3, 6, 8, 4, seed=2)),
        (drawn(3, 4, 4, 4, seed=1), drawn(3, 6, 8, 8, seed=2)),
        (drawn(3, 4, 20, 20, seed=1), drawn(3, 6, 20, 20, seed=2)),
        (drawn(3, 4, 20, 20, seed=1), drawn(3, 6, 10, 10, seed=2)),
        (drawn(3, 4, 20, 20, seed=1), drawn(3, 6, 40, 40, seed=2)),
    ],
)
def test_module_equals_the_function_at_any_sizes(student, teacher):
    module, inputs = build_loss(CONFIG, {"a": student}, {"b": teacher})
    per_sample = module(inputs)
    assert per_sample.shape == (3,)
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    expected = nst_loss(pool_to(student, size), pool_to(teacher, size))
    assert per_sample.mean().item() == pytest.approx(expected.mean().item(), rel=1e-9)


def test_pairs_are_summed():
    config = NST(loss="nst", layers=(("a", "b"), ("c", "d")))
    module, inputs = build_loss(
        config,
        {"a": STUDENT_MAPS, "c": LARGER_STUDENT_MAPS},
        {"b": TEACHER_MAPS, "d": THEIR_TEACHER_MAPS},
    )
    assert module(inputs).mean().item() == pytest.approx(0.08043783546 + 0.178532368581, rel=1e-9)


@pytest.mark.parametrize(("student", "teacher"), [((16, 8, 8), (32, 32)), ((16, 32, 32), (5, 32, 16)), ((64,), (4, 4))])
def test_mismatched_shapes_are_errors_with_both_shapes(student, teacher):
    (feature,) = CONFIG.required_features({"a": student})
    with pytest.raises(RecipeError) as refusal:
        CONFIG.build({"a": student}, {feature: teacher}, DATASET)
    assert str(list(student)) in str(refusal.value)
    assert str(list(teacher)) in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("edge", ["dead", "dead channel", "alike", "one sample"])
def test_value_and_gradient_are_finite_at_the_edges(edge, size, dtype):
    student = drawn(2, 5, size, size, seed=1).to(dtype)
    if edge == "dead":
        student = torch.zeros_like(student)
    if edge == "dead channel":
        student[:, 0] = 0
    if edge == "one sample":
        student = student[:1]
    teacher = student.clone() if edge == "alike" else drawn(len(student), 6, size, size, seed=2).float()
    student.requires_grad_()
    loss = nst_loss(student, teacher).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    if edge == "alike":
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_mixed_precision_does_not_round_the_products():
    student, teacher = drawn(4, 16, 8, 8, seed=1).float(), drawn(4, 16, 8, 8, seed=2).float()
    expected = nst_loss(student, teacher).mean().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nst_loss(student, teacher).mean().item() == pytest.approx(expected, rel=1e-6)
        alike = nst_from_gram(student, spatial_gram(student.double()))
    assert alike.abs().max() < 1e-10


def test_default_weight_matches_the_reference_code():
    assert CONFIG.weight == 50
