"""Losses on maps before the activation (AB, OFD) and between layers (FSP) against their formulas, in float64."""

import math

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_HINTS, TEACHER_HINTS, build_loss, drawn, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.ab import AB, ab_loss
from kdpipe.stages.losses.features.ofd import OFD, ofd_loss
from kdpipe.stages.losses.statistics.fsp import FSP, flow, fsp_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec

SMALL = drawn(8, 5, 4, 4, seed=21)


def ab_formula(student, teacher, margin):
    """Return equation 6 as RepDistiller has it, value by value, of the whole batch."""
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0])
def test_ab_is_the_distance_from_the_margin(margin):
    total = ab_loss(STUDENT_HINTS, TEACHER_HINTS, margin).sum().item()
    assert total == pytest.approx(ab_formula(STUDENT_HINTS, TEACHER_HINTS, margin), rel=1e-12)


def test_ab_needs_only_the_signs_of_the_teacher():
    assert torch.equal(ab_loss(STUDENT_HINTS, TEACHER_HINTS), ab_loss(STUDENT_HINTS, TEACHER_HINTS.relu()))


def test_deeper_pairs_of_ab_weigh_twice_as_much():
    config = AB(layers=(("a", "b"), ("c", "d")))
    maps = {"a": STUDENT_HINTS, "c": SMALL}, {"b": TEACHER_HINTS, "d": SMALL.flip(0)}
    module, inputs = build_loss(config, *maps)
    assert not list(module.parameters())  # equal shapes need no adapter
    expected = ab_loss(STUDENT_HINTS, TEACHER_HINTS) / 2 + ab_loss(SMALL, SMALL.flip(0))
    torch.testing.assert_close(module(inputs), expected)
    assert (config.weight, config.margin, config.stage_epochs, config.stages()) == (0.003, 1.0, 30, (config,))


def test_the_adapter_of_ab_has_no_relu():
    module, inputs = build_loss(AB(layers=(("a", "b"),)), {"a": SMALL}, {"b": drawn(8, 7, 4, 4, seed=22)})
    assert [type(one).__name__ for one in module.pairs[0].adapter] == ["Conv2d", "BatchNorm2d"]
    assert (module.pairs[0].adapter(SMALL) < 0).any()
    assert module(inputs).shape == (8,)


def ofd_formula(student, teacher, margins):
    """Return the partial distance as the authors' code has it, value by value, of the whole batch."""
    total = 0.0
    for own, other, margin in zip(student.unbind(1), teacher.unbind(1), margins.tolist(), strict=True):
        for s, t in zip(own.flatten().tolist(), other.flatten().tolist(), strict=True):
            if s > margin and t <= margin:
                total += (s - margin) ** 2
            if (s > t and margin < t <= 0) or t > 0:
                total += (s - t) ** 2
    return total


def test_ofd_is_the_partial_distance_to_the_raised_maps():
    margins = -drawn(32, seed=23).abs()
    total = ofd_loss(STUDENT_HINTS, TEACHER_HINTS, margins).sum().item()
    assert total == pytest.approx(ofd_formula(STUDENT_HINTS, TEACHER_HINTS, margins), rel=1e-12)


def test_margins_are_means_of_all_negative_values_so_far():
    first, second = drawn(8, 6, 4, 4, seed=24), drawn(8, 6, 4, 4, seed=25) - 1
    module, inputs = build_loss(OFD(layers=(("a", "b"),)), {"a": SMALL}, {"b": first})
    module(inputs)
    losses = module(make_inputs(student={"a": SMALL}, teacher={FeatureSpec("b", size=(4, 4)): second}))
    columns = torch.cat([first, second]).transpose(0, 1).flatten(1)
    margins = torch.stack([column[column < 0].mean() for column in columns])
    adapted = module.pairs[0].adapter(SMALL)
    torch.testing.assert_close(losses, ofd_loss(adapted, second, margins))
    assert not torch.allclose(losses, ofd_loss(adapted, second, margins * 0))
    assert "pairs.0.negatives" in module.state_dict()


def test_ofd_refuses_maps_after_a_relu():
    module, inputs = build_loss(OFD(layers=(("a", "b"),)), {"a": SMALL}, {"b": SMALL.relu()})
    with pytest.raises(RecipeError, match="the teacher's 'b' has no negative value, as after a ReLU"):
        module(inputs)


def test_fsp_compares_products_of_consecutive_layers():
    student = [drawn(2, 3, 4, 4, seed=26), drawn(2, 5, 2, 2, seed=27), drawn(2, 2, 4, 4, seed=28)]
    teacher = [drawn(2, 3, 6, 6, seed=29), drawn(2, 5, 6, 6, seed=30), drawn(2, 2, 3, 3, seed=31)]
    pooled = (
        student[0].reshape(2, 3, 2, 2, 2, 2).mean((3, 5)),
        student[1],
        student[2].reshape(2, 2, 2, 2, 2, 2).mean((3, 5)),
    )
    expected = torch.zeros(2, dtype=torch.float64)
    for sample in range(2):
        for first, second in ((0, 1), (1, 2)):
            other = flow(teacher[first], teacher[second])[sample]
            for one in range(student[first].shape[1]):
                for two in range(student[second].shape[1]):
                    own = (pooled[first][sample, one] * pooled[second][sample, two]).mean()
                    expected[sample] += (own - other[two, one]) ** 2 / other.numel()
    torch.testing.assert_close(fsp_loss(student, teacher), expected)
    layers = (("a", "b"), ("c", "d"))
    module, inputs = build_loss(
        FSP(layers=layers), {"a": student[0], "c": student[1]}, {"b": teacher[0], "d": teacher[1]}
    )
    inputs = make_inputs(student=inputs.student.features, teacher=inputs.teacher.features, labels=torch.arange(2))
    torch.testing.assert_close(module(inputs), fsp_loss(student[:2], teacher[:2]))


@pytest.mark.parametrize(
    ("layers", "fault"),
    [((("a", "b"),), "give two or more pairs"), ((("a", "b"), ("c", "d")), "same number of channels")],
)
def test_fsp_refuses_one_pair_and_other_widths(layers, fault):
    shapes = {"a": (3, 4, 4), "c": (5, 2, 2)}, {FeatureSpec("b"): (3, 4, 4), FeatureSpec("d"): (6, 2, 2)}
    with pytest.raises(RecipeError, match=fault):
        FSP(layers=layers).build(*shapes, DATASET)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (100 * one.to(dtype) for one in (STUDENT_HINTS, TEACHER_HINTS))
    margins = torch.full((32,), -1.0, dtype=torch.float64)
    for found, exact in (
        (ab_loss(student, teacher), ab_loss(student.double(), teacher.double())),
        (ofd_loss(student, teacher, margins), ofd_loss(student.double(), teacher.double(), margins)),
        (fsp_loss([student] * 2, [teacher] * 2), fsp_loss([student.double()] * 2, [teacher.double()] * 2)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_equal_and_zero_maps_have_finite_gradients():
    zeros = torch.zeros(1, 3, 2, 2, requires_grad=True)
    other = torch.zeros(1, 3, 2, 2)
    loss = ab_loss(zeros, other) + ofd_loss(zeros, other, torch.zeros(3)) + fsp_loss([zeros] * 2, [other] * 2)
    loss.sum().backward()
    assert loss.item() == 12.0  # of ab: each value is at the boundary, 1 from its margin
    assert zeros.grad.isfinite().all()
    assert math.isfinite(loss.item())
