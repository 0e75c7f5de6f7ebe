"""VID: a Gaussian's negative log-likelihood with a learned variance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import (
    DATASET,
    LARGER_STUDENT_MAPS,
    STUDENT_MAPS,
    STUDENT_VECTORS,
    TEACHER_MAPS,
    TEACHER_VECTORS,
    build_loss,
    drawn,
)

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.vid import VID, VIDModule, vid_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.statistics import pool_to

CONFIG = VID(loss="vid", layers=(("a", "b"),))


def test_it_is_the_gaussian_likelihood_without_its_constant():
    mean, teacher = drawn(2, 3, 4, 4, seed=1), drawn(2, 3, 4, 4, seed=2)
    variance = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    expected = F.gaussian_nll_loss(mean, teacher, variance.view(1, 3, 1, 1).expand_as(mean), eps=0)
    assert vid_loss(mean, variance, teacher).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradient_matches_finite_differences():
    mean, variance = drawn(2, 3, 2, 2, seed=1).requires_grad_(), drawn(3, seed=2).square().add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vid_loss(m, v, TEACHER_MAPS[:2, :3, :2, :2]).mean(), (mean, variance))


@pytest.mark.parametrize("init_pred_var", [0.01, 5.0, 1000.0])
def test_initial_variance_is_the_configured_one(init_pred_var):
    _, variance = VIDModule(3, 4, init_pred_var).predict(torch.zeros(1, 3, 2, 2))
    assert variance.shape == (4,)
    assert variance.tolist() == pytest.approx([init_pred_var] * 4, rel=1e-4)


def test_module_is_the_likelihood_of_its_predictions():
    module, inputs = build_loss(CONFIG, {"a": STUDENT_MAPS}, {"b": TEACHER_MAPS})
    per_sample = module(inputs)
    mean, variance = module.pairs[0].predict(STUDENT_MAPS)
    assert mean.shape == TEACHER_MAPS.shape
    assert per_sample.shape == (8,)
    assert per_sample.mean().item() == pytest.approx(vid_loss(mean, variance, TEACHER_MAPS).mean().item(), rel=1e-12)
    assert torch.allclose(module(inputs.rows(torch.tensor([6, 2]))), per_sample[[6, 2]])


def test_larger_map_is_pooled_on_either_side():
    module, inputs = build_loss(CONFIG, {"a": LARGER_STUDENT_MAPS}, {"b": TEACHER_MAPS})
    mean, variance = module.pairs[0].predict(pool_to(LARGER_STUDENT_MAPS, (8, 8)))
    assert module(inputs).mean().item() == pytest.approx(
        vid_loss(mean, variance, TEACHER_MAPS).mean().item(), rel=1e-12
    )
    assert CONFIG.required_features({"a": (16, 8, 8)}) == (FeatureSpec("b", size=(8, 8)),)
    module, inputs = build_loss(CONFIG, {"a": TEACHER_MAPS}, {"b": LARGER_STUDENT_MAPS})
    mean, variance = module.pairs[0].predict(TEACHER_MAPS)
    expected = vid_loss(mean, variance, pool_to(LARGER_STUDENT_MAPS, (8, 8))).mean()
    assert module(inputs).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_vectors_equal_maps_of_one_pixel():
    module, inputs = build_loss(CONFIG, {"a": STUDENT_VECTORS}, {"b": TEACHER_VECTORS})
    as_maps, maps = build_loss(
        CONFIG, {"a": STUDENT_VECTORS[:, :, None, None]}, {"b": TEACHER_VECTORS[:, :, None, None]}
    )
    as_maps.load_state_dict(module.state_dict())
    assert module(inputs).shape == (8,)
    assert torch.allclose(module(inputs), as_maps(maps))


def test_predictors_train_and_the_likelihood_grows():
    module, inputs = build_loss(
        VID(loss="vid", layers=(("a", "b"), ("c", "d"))),
        {"a": STUDENT_MAPS, "c": STUDENT_VECTORS},
        {"b": TEACHER_MAPS, "d": TEACHER_VECTORS},
    )
    losses = []
    for _ in range(5):
        loss = module(inputs).mean()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_mismatched_shapes_are_errors_with_both_shapes():
    with pytest.raises(RecipeError, match=r"vid cannot join the student's a, .*\[16, 8, 8\].* \[32, 8, 4\]"):
        CONFIG.build({"a": (16, 8, 8)}, {FeatureSpec("b", size=(8, 8)): (32, 8, 4)}, DATASET)
    with pytest.raises(RecipeError, match=r"\[5, 16\].* \[32\]"):
        CONFIG.build({"a": (5, 16)}, {FeatureSpec("b"): (32,)}, DATASET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", ["dead", "one sample"])
def test_value_and_gradient_are_finite_at_the_edges(edge, dtype):
    student = (0 * STUDENT_MAPS if edge == "dead" else STUDENT_MAPS[:1]).to(dtype).requires_grad_()
    module, inputs = build_loss(CONFIG, {"a": student}, {"b": TEACHER_MAPS[: len(student)]}, dtype=torch.float32)
    loss = module(inputs).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_variance_stays_above_its_minimum():
    predictor = VIDModule(3, 4, 5.0)
    with torch.no_grad():
        predictor.log_scale.fill_(-1000)
    mean, variance = predictor.predict(torch.zeros(1, 3, 2, 2))
    loss = vid_loss(mean, variance, torch.zeros(1, 4, 2, 2)).mean()
    loss.backward()
    assert variance.min() > 0
    assert torch.isfinite(loss)
    assert torch.isfinite(predictor.log_scale.grad).all()


def test_defaults_match_the_reference_code():
    assert (CONFIG.weight, CONFIG.init_pred_var) == (1, 5)
