"""Losses on projected vectors and channels (PEFD, SRD, VkD, CWD, WKD-F) against their formulas, in float64."""

import math

import pytest
import torch
from support.loss_inputs import STUDENT_MAPS, STUDENT_VECTORS, TEACHER_MAPS, TEACHER_VECTORS, build_loss, drawn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.pefd import PEFD
from kdpipe.stages.losses.features.srd import SRD, srd_loss
from kdpipe.stages.losses.features.vkd import VkD, vkd_loss
from kdpipe.stages.losses.statistics.cwd import CWD, cwd_loss
from kdpipe.stages.losses.statistics.wkd import WKDF, wkd_f_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.statistics import mean_std

LAYERS = (("a", "b"),)


def built(config, student=STUDENT_VECTORS, teacher=TEACHER_VECTORS):
    module, inputs = build_loss(config, {"a": student}, {"b": teacher})
    return module.pairs[0], module(inputs)


def test_pefd_is_the_cosine_with_the_mean_of_projections():
    module, losses = built(PEFD(layers=LAYERS))
    assert len(module.projectors) == 3
    weights = [one.linear.weight for one in module.projectors]
    assert not torch.equal(weights[0], weights[1])
    outputs = [(STUDENT_VECTORS @ one.linear.weight.T + one.linear.bias).clamp(min=0) for one in module.projectors]
    mean = sum(outputs) / 3
    cosines = (mean * TEACHER_VECTORS).sum(1) / (mean.norm(dim=1) * TEACHER_VECTORS.norm(dim=1))
    torch.testing.assert_close(losses, 1 - cosines)


def test_srd_is_the_log_of_the_sum_of_fourth_powers():
    student, teacher = drawn(8, 5, seed=1), drawn(8, 5, seed=2)
    columns = [[(x - x.mean()) / (x.var(correction=0) + 1e-4).sqrt() for x in rows.T] for rows in (student, teacher)]
    total = sum(((s - t) ** 4).sum() for s, t in zip(*columns, strict=True))
    assert srd_loss(student, teacher).item() == pytest.approx(math.log(total + 1e-5), rel=1e-12)
    module, loss = built(SRD(layers=LAYERS))
    assert torch.equal(loss, srd_loss(module.projector(STUDENT_VECTORS), TEACHER_VECTORS))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_srd_is_finite_for_equal_and_single_rows(batch_size):
    rows = torch.ones(batch_size, 4, requires_grad=True)
    loss = srd_loss(rows, rows.detach())
    loss.backward()
    assert loss.isfinite() and rows.grad.isfinite().all()


def test_vkd_projects_orthogonally():
    module, losses = built(VkD(layers=LAYERS))
    weight = module.projector.linear.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(16, dtype=torch.float64))
    centered = TEACHER_VECTORS - TEACHER_VECTORS.mean(1, keepdim=True)
    target = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    errors = (STUDENT_VECTORS @ weight.T + module.projector.linear.bias - target).abs()
    torch.testing.assert_close(losses, torch.where(errors < 1, errors**2 / 2, errors - 0.5).mean(1))


def test_vkd_stays_orthogonal_while_it_trains():
    module, _ = built(VkD(layers=LAYERS))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(STUDENT_VECTORS, TEACHER_VECTORS).mean().backward()
        optimizer.step()
    weight = module.projector.linear.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_divergence_over_positions(temperature):
    student, teacher = drawn(3, 4, 2, 5, seed=1), drawn(3, 4, 2, 5, seed=2)
    expected = []
    for maps in zip(student, teacher, strict=True):
        channels = zip(*((one.reshape(4, 10) / temperature).softmax(1) for one in maps), strict=True)
        expected.append(temperature**2 * sum((t * (t / s).log()).sum() for s, t in channels) / 4)
    torch.testing.assert_close(cwd_loss(student, teacher, temperature), torch.stack(expected))


def test_cwd_adapts_channels_and_sizes():
    module, losses = built(CWD(layers=LAYERS), STUDENT_MAPS, TEACHER_MAPS)
    assert module.adapter.weight.shape == (32, 16, 1, 1) and losses.shape == (8,)
    assert CWD(layers=LAYERS).required_features({"a": (16, 4, 4)}) == (FeatureSpec("b", size=(4, 4)),)
    with pytest.raises(RecipeError, match="cwd cannot join the student's a"):
        built(CWD(layers=LAYERS), STUDENT_VECTORS, TEACHER_MAPS)


def test_wkd_f_is_the_distance_of_means_and_deviations():
    student, teacher = drawn(3, 4, 2, 5, seed=1), drawn(3, 4, 6, 6, seed=2)
    expected = torch.zeros(3, dtype=torch.float64)
    for sample, (one, other) in enumerate(zip(student, teacher, strict=True)):
        for s, t in zip(one, other, strict=True):
            deviations = [(x.flatten().var() + 1e-5).sqrt() for x in (s, t)]
            expected[sample] += 3 * (s.mean() - t.mean()) ** 2 + (deviations[0] - deviations[1]) ** 2
    torch.testing.assert_close(wkd_f_loss(student, teacher, mean_weight=3.0), expected)
    assert mean_std(torch.ones(2, 4, 1, 1)).isfinite().all()


def test_wkd_f_needs_two_numbers_a_channel():
    config = WKDF(layers=LAYERS)
    assert config.required_features({"a": (16, 4, 4)}) == (FeatureSpec("b", "mean_std"),)
    module, losses = built(config, STUDENT_MAPS, TEACHER_MAPS)
    adapted = module.adapter(STUDENT_MAPS)
    torch.testing.assert_close(losses, wkd_f_loss(adapted, TEACHER_MAPS))
    with pytest.raises(RecipeError, match="wkd_f cannot join"):
        config.build({"a": (16,)}, {FeatureSpec("b", "mean_std"): (2, 32)}, None)


@pytest.mark.parametrize("function", [srd_loss, vkd_loss])
def test_gradients_match_finite_differences(function):
    student = drawn(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: function(one, drawn(4, 5, seed=2)).mean(), student)
