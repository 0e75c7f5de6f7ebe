"""Attention transfer matches the reference code, and is finite for dead, equal and differently sized maps."""

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
from kdpipe.stages.losses.statistics.at import AT
from kdpipe.stages.targets.feature_spec import ATTENTION, FeatureSpec


def at_loss(student, teacher, variant="code"):
    return loss_of_pair(AT(loss="at", layers=(("a", "b"),), variant=variant), student, teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "variant", "expected"),
    [
        (STUDENT_MAPS, TEACHER_MAPS, "code", 0.006175765838),
        (LARGER_STUDENT_MAPS, THEIR_TEACHER_MAPS, "code", 0.003754808673),
        (STUDENT_MAPS, TEACHER_MAPS, "paper", 0.626332294259),
    ],
)
def test_at_matches_the_reference_code(student, teacher, variant, expected):
    assert at_loss(student, teacher, variant).item() == pytest.approx(expected, rel=1e-9)


def naive(student, teacher):
    """The paper's variant, sample by sample."""
    lengths = []
    for own, other in zip(student, teacher, strict=True):
        maps = [sum(channel**2 for channel in each) for each in (own, other)]
        own_map, their_map = [each / (each**2).sum().sqrt() for each in maps]
        lengths.append(((own_map - their_map) ** 2).sum().sqrt().item())
    return sum(lengths) / len(lengths)


def test_the_papers_form_is_the_mean_length_of_the_difference():
    assert at_loss(STUDENT_MAPS, TEACHER_MAPS, "paper").item() == pytest.approx(naive(STUDENT_MAPS, TEACHER_MAPS))


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_at_gradient_by_the_maps_equals_finite_differences(variant):
    student, teacher = drawn(2, 3, 4, 2, seed=1).requires_grad_(), drawn(2, 5, 2, 1, seed=2)
    assert torch.autograd.gradcheck(lambda maps: at_loss(maps, teacher, variant), student)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_module_sums_pairs_per_sample(variant):
    config = AT(loss="at", layers=(("a", "b"), ("c", "d")), variant=variant)
    module, inputs = build_loss(
        config,
        {"a": STUDENT_MAPS, "c": LARGER_STUDENT_MAPS},
        {"b": TEACHER_MAPS, "d": THEIR_TEACHER_MAPS},
    )
    expected = at_loss(STUDENT_MAPS, TEACHER_MAPS, variant) + at_loss(LARGER_STUDENT_MAPS, THEIR_TEACHER_MAPS, variant)
    per_sample = module(inputs)
    assert per_sample.shape == (8,)
    assert per_sample.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(module(inputs.rows(torch.tensor([5, 1]))), per_sample[[5, 1]])


def test_teachers_maps_are_required_at_the_students_size():
    config = AT(loss="at", layers=(("a", "b"),))
    assert config.required_features({"a": (16, 8, 8)}) == (FeatureSpec("b", ATTENTION, (8, 8)),)
    module, inputs = build_loss(config, {"a": STUDENT_MAPS}, {"b": LARGER_STUDENT_MAPS})
    assert inputs.teacher.features[FeatureSpec("b", ATTENTION, (8, 8))].shape == (8, 8, 8)
    assert module(inputs).mean().item() == pytest.approx(at_loss(STUDENT_MAPS, LARGER_STUDENT_MAPS).item())


def test_mismatched_shapes_are_errors_with_both_shapes():
    config = AT(loss="at", layers=(("layer2", "block2"),))
    feature = config.required_features({"layer2": (16, 8, 8)})[0]
    with pytest.raises(RecipeError, match=r"at cannot join the student's layer2, .*\[16, 8, 8\].* \[8, 4\]"):
        config.build({"layer2": (16, 8, 8)}, {feature: (8, 4)}, DATASET)
    with pytest.raises(RecipeError, match=r"\[64\].* \[8, 8\]"):
        config.build({"layer2": (64,)}, {config.required_features({"layer2": (64,)})[0]: (8, 8)}, DATASET)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", ["dead", "dead teacher", "alike", "one sample", "huge"])
def test_value_and_gradient_are_finite_at_the_edges(edge, dtype, variant):
    student = torch.zeros(2, 3, 4, 4) if edge == "dead" else drawn(2, 3, 4, 4, seed=1).float().relu()
    teacher = student if edge == "alike" else drawn(2, 5, 4, 4, seed=2).float().relu()
    if edge == "dead teacher":
        teacher = torch.zeros_like(teacher)
    if edge == "one sample":
        student, teacher = student[:1], teacher[:1]
    student = (1e4 * student if edge == "huge" else student).to(dtype).requires_grad_()
    loss = at_loss(student, student.detach() if edge == "alike" else teacher, variant)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    if edge == "alike":
        assert loss.item() == 0


def test_half_precision_is_pooled_in_float32():
    student = LARGER_STUDENT_MAPS.bfloat16()
    module, inputs = build_loss(AT(loss="at", layers=(("a", "b"),)), {"a": student}, {"b": THEIR_TEACHER_MAPS})
    expected = at_loss(student.float(), THEIR_TEACHER_MAPS).item()
    assert module(inputs).mean().item() == pytest.approx(expected, rel=1e-5)


def test_default_weight_matches_the_reference_code():
    assert AT(loss="at", layers=(("a", "b"),)).weight == 1000
