"""SRRL against its formula, in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import STUDENT_MAPS, STUDENT_VECTORS, TEACHER_HEAD, TEACHER_VECTORS, assert_finite, build_loss

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.srrl import SRRL, srrl_loss

TEACHER = {"pre_logits": TEACHER_VECTORS, "pre_logits:head": TEACHER_HEAD}
WEIGHT, BIAS = TEACHER_HEAD[:, :-1], TEACHER_HEAD[:, -1]


def test_maps_are_connected_pooled_and_classified():
    """As in the authors' code: both errors are means, of vectors and of the logits with their biases."""
    module, inputs = build_loss(SRRL(layer="a", logit_weight=0.5), {"a": STUDENT_MAPS}, TEACHER)
    convolution, norm, _ = module.adapter
    maps = F.batch_norm(F.conv2d(STUDENT_MAPS, convolution.weight), None, None, norm.weight, norm.bias, training=True)
    vectors = maps.clamp(min=0).flatten(2).mean(2)
    logits = [rows @ WEIGHT.T + BIAS for rows in (vectors, TEACHER_VECTORS)]
    expected = F.mse_loss(vectors, TEACHER_VECTORS) + 0.5 * F.mse_loss(*logits)
    torch.testing.assert_close(module(inputs).mean(), expected)


def test_vectors_are_maps_of_one_pixel():
    module, inputs = build_loss(SRRL(), {"pre_logits": STUDENT_VECTORS}, TEACHER)
    pixels, same = build_loss(SRRL(), {"pre_logits": STUDENT_VECTORS[:, :, None, None]}, TEACHER)
    assert torch.equal(module(inputs), pixels(same))


def test_initial_weights_are_the_authors():
    module, _ = build_loss(SRRL(layer="a"), {"a": STUDENT_MAPS}, TEACHER)
    assert module.adapter[0].weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert module.adapter[0].bias is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_loss_and_gradient_are_finite(scale):
    vectors = (scale * TEACHER_VECTORS.float()).requires_grad_()
    assert_finite(srrl_loss(vectors, TEACHER_VECTORS.half(), TEACHER_HEAD.float()).mean(), vectors)
    assert srrl_loss(TEACHER_VECTORS, TEACHER_VECTORS, TEACHER_HEAD).eq(0).all()


def test_tokens_and_other_heads_are_errors():
    with pytest.raises(RecipeError, match=r"the student's a has shape \[16, 64\]: choose its last map"):
        build_loss(SRRL(layer="a"), {"a": STUDENT_MAPS.flatten(2)}, TEACHER)
    with pytest.raises(RecipeError, match=r"head takes 7 numbers, and its pre_logits has shape \[32\]"):
        build_loss(SRRL(layer="a"), {"a": STUDENT_MAPS}, {**TEACHER, "pre_logits:head": TEACHER_HEAD[:, :8]})
