"""Gradient-based attention transfer: the loss, its double backward pass, and tiny gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import DATASET, drawn, loss_of_pair, make_inputs
from torch import nn

from kdpipe.stages.losses.statistics.at import AT, ATGradient, at_loss
from kdpipe.stages.targets.feature_spec import INPUT, INPUT_GRADIENT, FeatureSpec
from kdpipe.stages.targets.statistics import attention, input_attention

GRADIENT, TEACHERS = drawn(8, 3, 6, 6, seed=1), drawn(8, 3, 6, 6, seed=2)
FEATURE = FeatureSpec(INPUT, INPUT_GRADIENT)


def at_gradient_loss(student, teacher, variant="code"):
    return at_loss(input_attention(student), input_attention(teacher), variant).mean()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_it_is_attention_transfer_on_the_input_gradient(variant):
    config = ATGradient(loss="at_gradient", variant=variant)
    assert config.required_features({}) == (FEATURE,)
    module = config.build({}, {FEATURE: (6, 6)}, DATASET)
    inputs = replace(make_inputs(teacher={FEATURE: attention(TEACHERS)}), input_gradient=GRADIENT)
    per_sample = module(inputs)
    assert per_sample.shape == (8,)
    at = loss_of_pair(AT(loss="at", layers=(("a", "b"),), variant=variant), GRADIENT, TEACHERS)
    assert per_sample.mean().item() == pytest.approx(at.item(), rel=1e-9)
    assert at_gradient_loss(GRADIENT, TEACHERS, variant).item() == pytest.approx(per_sample.mean().item(), rel=1e-12)


def test_missing_gradient_is_an_error():
    module = ATGradient(loss="at_gradient").build({}, {FEATURE: (6, 6)}, DATASET)
    with pytest.raises(ValueError, match="gradient"):
        module(make_inputs(teacher={FEATURE: attention(TEACHERS)}))


def loss_of_a_network(weight, bias, images, labels, teacher, variant):
    """A smooth network's loss as a function of its parameters: conv, tanh, mean, softmax."""
    logits = torch.tanh(F.conv2d(images, weight, bias)).mean((2, 3))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), images, create_graph=True)
    return at_gradient_loss(gradient, teacher, variant)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_double_backward_matches_finite_differences(variant):
    images, teacher = drawn(2, 2, 4, 4, seed=3).requires_grad_(), drawn(2, 2, 4, 4, seed=4)
    weight, bias = drawn(3, 2, 3, 3, seed=5).requires_grad_(), drawn(3, seed=6).requires_grad_()
    labels = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(
        lambda w, b: loss_of_a_network(w, b, images, labels, teacher, variant), (weight, bias), rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_attention_is_independent_of_the_gradients_scale(scale):
    small = (scale * GRADIENT).float()
    assert torch.allclose(input_attention(small), input_attention(GRADIENT).float(), atol=1e-6)
    assert torch.allclose(input_attention(small).flatten(1).norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_zero_gradient_gives_finite_loss_and_gradient(variant, dtype):
    gradient = torch.zeros(1, 3, 6, 6, dtype=dtype, requires_grad=True)
    loss = at_gradient_loss(gradient, TEACHERS[:1], variant)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient.grad).all()


@pytest.mark.parametrize("logit", [30.0, 300.0])
def test_confident_student_gives_finite_gradients(logit):
    model = nn.Linear(2 * 4 * 4, 2)
    with torch.no_grad():
        model.weight.copy_(drawn(2, 32, seed=7).float())
        model.bias.copy_(torch.tensor([logit, -logit]))
    images = drawn(1, 2, 4, 4, seed=8).float().requires_grad_()
    cross_entropy = F.cross_entropy(model(images.flatten(1)), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(cross_entropy, images, create_graph=True)
    loss = at_gradient_loss(gradient, drawn(1, 2, 4, 4, seed=9).float())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_equal_gradients_have_zero_loss():
    gradient = GRADIENT.clone().requires_grad_()
    loss = at_gradient_loss(gradient, GRADIENT, "paper")
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(gradient.grad).all()


def test_config_requires_the_gradient_with_ats_weight():
    assert ATGradient.input_gradient
    assert ATGradient(loss="at_gradient").weight == 1000
