"""Layers of an INT8 file: integer weights with their scales."""

from __future__ import annotations

import torch

# Registers torch.ops.quantized_decomposed, which torch's exporter writes as (De)QuantizeLinear.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.fake_quant import (
    ACTIVATION_MAX,
    WEIGHT_MAX,
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    input_scale_of,
    integer_bias,
    round_weight,
    weight_and_bias_scales,
)


class QuantizeDequantize(nn.Module):
    """A conversion to unsigned 8-bit and back, for a tensor of any shape."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.scale_and_zero_point()
        self.scale, self.zero_point = float(scale), int(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        ops, grid = torch.ops.quantized_decomposed, (self.scale, self.zero_point, 0, ACTIVATION_MAX, torch.uint8)
        dequantized: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *grid), *grid)
        return dequantized


class Int8Weights(nn.Module):
    """The int8 weight [O, ...] and the int32 bias [O] of a layer, stored as integers and dequantized on each call.

    `input_scale` [] is the quantization step of the layer's inputs; without one, the bias stays float.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    bias_scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> None:
        super().__init__()
        scale, bias_scale = weight_and_bias_scales(weight, bias, input_scale)
        if bias is not None and bias_scale is not None:
            bias = integer_bias(bias, bias_scale).to(torch.int32)
        steps = scale.view(-1, *[1] * (weight.dim() - 1))
        self.register_buffer("weight", torch.round(round_weight(weight, scale) / steps).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", bias_scale)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
        weight = dequantize(self.weight, self.scale, self.zero, 0, -WEIGHT_MAX, WEIGHT_MAX, torch.int8)
        if self.bias is None or self.bias_scale is None:
            return weight, self.bias
        return weight, dequantize(self.bias, self.bias_scale, self.zero, 0, -(2**31), 2**31 - 1, torch.int32)


def int8_layer(layer: QuantConv2d | QuantLinear) -> nn.Module:
    """Return the integer layer that computes what a rounding `layer` computes."""
    with torch.no_grad():
        weights = Int8Weights(layer.weight, layer.bias, input_scale_of(layer))
    return Int8Conv2d(layer, weights) if isinstance(layer, QuantConv2d) else Int8Linear(weights)


class FloatLayer(nn.Module):
    """A convolution or linear layer that stays float between two grids, its bias subtracted as a negative one.

    onnxruntime rounds the weights of any float layer between DequantizeLinear and QuantizeLinear (its
    WeightBiasQuantization). A subtraction in between prevents that; an addition would be fused into the layer.
    """

    shift: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        layer.bias = None
        self.register_buffer("shift", -bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else -bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) - self.shift
        return output


class Int8Conv2d(nn.Module):
    """A convolution over int8 weights, with the stride, padding etc. of `conv`."""

    def __init__(self, conv: QuantConv2d, weights: Int8Weights) -> None:
        super().__init__()
        self.weights = weights
        self._convolve = conv._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        output: Tensor = self._convolve(x, weight, bias)
        return output


class Int8Linear(nn.Module):
    """A linear layer over int8 weights."""

    def __init__(self, weights: Int8Weights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        output: Tensor = F.linear(x, weight, bias)
        return output
