"""Parameters and multiply-accumulates, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_nets import EXAMPLE, IMAGE_SHAPE, build
from torch import nn

from stages.compression.complexity import count_macs
from stages.compression.quantize import prepare_qat
from stages.errors import ModelError
from stages.models.weights import count_parameters


def test_convolutions_count_every_place_of_their_output():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    assert count_macs(model, IMAGE_SHAPE) == 4 * 4 * 16 * 3 * 9
    assert count_parameters(model) == 16 * 3 * 9 + 16 + 2 * 16


def test_a_depthwise_convolution_counts_one_input_channel():
    assert count_macs(nn.Conv2d(3, 6, 3, padding=1, groups=3), IMAGE_SHAPE) == 8 * 8 * 6 * 9


def test_a_linear_layer_counts_its_weights():
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), IMAGE_SHAPE) == 192 * 5


class Attention(nn.Module):
    """Eight tokens of 24 numbers attend to each other with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_attention_counts_its_projections_and_both_products():
    assert count_macs(Attention(), IMAGE_SHAPE) == 8 * 24 * (3 * 24 + 24) + 2 * 8 * 8 * 24


def test_a_model_prepared_for_int8_counts_like_the_float_one():
    model = build("residual")
    wanted = count_macs(model, IMAGE_SHAPE)
    assert count_macs(prepare_qat(model, EXAMPLE), IMAGE_SHAPE) == wanted


def test_counting_leaves_the_model_and_attention_as_they_were():
    model = build("residual").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    heard = []
    model.fc.register_forward_hook(lambda *_: heard.append(1))
    count_macs(model, IMAGE_SHAPE)
    assert not heard and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_image_that_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"does not run on an image of shape \[4, 8, 8\]"):
        count_macs(build("residual"), (4, 8, 8))
