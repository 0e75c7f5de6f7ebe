"""Tests of multiply-accumulates against counts by hand."""

from __future__ import annotations

import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, build
from torch import nn

from kdpipe.stages.compress.quantization.qat import prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.weights.state_dict import count_parameters


def test_conv_macs():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    assert count_macs(model, IMAGE_SHAPE) == 4 * 4 * 16 * 3 * 9
    assert count_parameters(model) == 16 * 3 * 9 + 16 + 2 * 16


def test_depthwise_conv_macs():
    assert count_macs(nn.Conv2d(3, 6, 3, padding=1, groups=3), IMAGE_SHAPE) == 8 * 8 * 6 * 9


def test_linear_macs():
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), IMAGE_SHAPE) == 192 * 5


class Attention(nn.Module):
    """Eight tokens of 24 numbers attend to each other with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_attention_macs():
    assert count_macs(Attention(), IMAGE_SHAPE) == 8 * 24 * (3 * 24 + 24) + 2 * 8 * 8 * 24


def test_prepared_model_has_the_float_macs():
    model = build("residual")
    expected = count_macs(model, IMAGE_SHAPE)
    assert count_macs(prepare_qat(model, EXAMPLE), IMAGE_SHAPE) == expected


def test_counting_leaves_model_and_attention_unchanged():
    model = build("residual").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    captured = []
    model.fc.register_forward_hook(lambda *_: captured.append(1))
    count_macs(model, IMAGE_SHAPE)
    assert not captured and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrong_image_shape_is_an_error():
    with pytest.raises(ModelError, match=r"does not run on an input of shape \[1, 4, 8, 8\]"):
        count_macs(build("residual"), (4, 8, 8))
