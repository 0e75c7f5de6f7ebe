"""Convert a prepared model to the graph of its ONNX file: quantize and dequantize around every operation (QDQ).

onnxruntime's CPU kernels fuse an operation only with Q and DQ around it: an addition or a pool without them runs in
float and makes the file slower than the float one. On the symmetric grid, that of TensorRT, biases are float numbers of
the same values: its parser takes no 32-bit integers.
"""

from __future__ import annotations

import operator

import torch

# Registers torch.ops.quantized_decomposed, which torch's exporter writes as (De)QuantizeLinear.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.fake_quant import (
    ACTIVATION_RANGES,
    WEIGHT_RANGES,
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    input_scale_of,
    integer_bias,
    quantizers_of,
    require_observed,
    round_weight,
    weight_and_bias_scales,
)
from kdpipe.stages.compress.quantization.fx_trace import module_of
from kdpipe.stages.compress.quantization.op_types import is_float_tensor, is_max_pool, kind_of, origin, pool_window
from kdpipe.stages.compress.quantization.placement import grid_of, insert_after, quantizers_after
from kdpipe.stages.export.int4_weights import PackedInt4
from kdpipe.stages.models.clone import clone_without_hooks


def int8_graph(prepared: fx.GraphModule) -> fx.GraphModule:
    """Return the QDQ form of a calibrated prepared model, on the CPU, in eval mode; `prepared` stays unchanged.

    Values that are only moved (max-pool, flatten, ...) keep their scale.

    Raises:
        ModelError: If the model was never calibrated.
    """
    require_observed(quantizers_of(prepared))
    copy = clone_without_hooks(prepared).cpu().eval()
    assert isinstance(copy, fx.GraphModule)
    for rewrite in (_requantize_after_move, _average_by_window):
        for node in list(copy.graph.nodes):
            rewrite(copy, node)
    _replace_layers(copy)
    _shield_float_pools(copy)
    _shield_float_layers(copy)
    for path, quantizer in quantizers_of(copy).items():
        copy.set_submodule(path, QuantizeDequantize(quantizer))
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def _requantize_after_move(copy: fx.GraphModule, node: fx.Node) -> None:
    """Quantize moved values once more: that changes none of them, but lets integers be moved.

    Zeros around the input of convolutions become their padding in the file.
    """
    if node.target is F.pad and all(isinstance(module_of(copy, user), QuantConv2d) for user in node.users):
        return
    if kind_of(copy, node) == "move" and is_float_tensor(node) and grid_of(copy, node) is not None:
        insert_after(copy, node, str(origin(copy, node).target))


def _average_by_window(copy: fx.GraphModule, node: fx.Node) -> None:
    """Rewrite a mean over maps as an average pool, flattened if needed: only that has an integer kernel."""
    window = pool_window(copy, node)
    if window is None:
        return
    reader = _sole_quantizer_after(copy, node)
    with copy.graph.inserting_before(node):
        averaged = copy.graph.call_function(F.avg_pool2d, (node.args[0], window))
        if len(node.meta["tensor_meta"].shape) == 2:
            if reader is not None:
                averaged = copy.graph.call_module(str(reader.target), (averaged,))
            averaged = copy.graph.call_function(torch.flatten, (averaged, 1))
    node.replace_all_uses_with(averaged)


def _replace_layers(copy: fx.GraphModule) -> None:
    """Replace every rounding layer by its integer version."""
    for node in copy.graph.nodes:
        layer = module_of(copy, node)
        if isinstance(layer, QuantConv2d | QuantLinear):
            copy.set_submodule(str(node.target), int8_layer(layer))


def _shield_float_layers(copy: fx.GraphModule) -> None:
    """Prevent onnxruntime from quantizing float layers between two grids."""
    for node in copy.graph.nodes:
        layer = module_of(copy, node)
        if type(layer) not in (nn.Conv2d, nn.Linear) or grid_of(copy, node.args[0]) is None:
            continue
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if quantizers_after(copy, node):
            copy.set_submodule(str(node.target), FloatLayer(layer))


def _shield_float_pools(copy: fx.GraphModule) -> None:
    """Prevent onnxruntime from moving a rounding from behind a float max pool to before it (QDQPropagation).

    A subtraction in between does: of a zero per channel, since a scalar zero would be optimized away.
    """
    for node in list(copy.graph.nodes):
        if not _rounds(copy, node):
            continue
        source = origin(copy, node.args[0], through=("same",))
        if is_max_pool(copy, source) and grid_of(copy, source) is None:
            name = f"zeros_behind_{source.name}"
            copy.register_buffer(name, torch.zeros(source.meta["tensor_meta"].shape[1], 1, 1))
            with copy.graph.inserting_before(node):
                node.args = (copy.graph.call_function(operator.sub, (node.args[0], copy.graph.get_attr(name))),)


def _rounds(copy: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node calls a quantizer."""
    return isinstance(module_of(copy, node), ActivationQuantizer)


def _sole_quantizer_after(copy: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the quantizer call that is the only reader of `node`, or None."""
    reader = next(iter(node.users), node)
    return reader if len(node.users) == 1 and _rounds(copy, reader) else None


DTYPES = {"affine": torch.uint8, "symmetric": torch.int8}
"""The integers of an activation, by grid."""


class QuantizeDequantize(nn.Module):
    """A conversion to 8-bit integers and back, for a tensor of any shape."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.scale_and_zero_point()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.range, self.dtype = ACTIVATION_RANGES[quantizer.grid], DTYPES[quantizer.grid]

    def forward(self, x: Tensor) -> Tensor:
        ops, grid = torch.ops.quantized_decomposed, (self.scale, self.zero_point, *self.range, self.dtype)
        dequantized: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *grid), *grid)
        return dequantized


class Int8Weights(nn.Module):
    """The integer weight [O, ...] and the int32 bias [O] of a layer, stored as such and dequantized on each call.

    A weight of 4 bits takes half a byte. Without a quantizer of the layer's inputs the bias stays float. On a symmetric
    grid the bias is stored as the float numbers that the integers stand for.
    """

    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    bias_scale: Tensor | None

    def __init__(self, layer: QuantConv2d | QuantLinear) -> None:
        super().__init__()
        weight, bias, self.bits = layer.weight, layer.bias, layer.bits
        input_grid = layer.input_grid[0] if layer.input_grid else None
        scale, bias_scale = weight_and_bias_scales(weight, bias, input_scale_of(layer), self.bits, layer.step_size)
        if bias is not None and bias_scale is not None:
            bias = integer_bias(bias, bias_scale)
            if input_grid is not None and input_grid.grid == "symmetric":
                bias, bias_scale = (bias * bias_scale).float(), None
            else:
                bias = bias.to(torch.int32)
        steps = scale.view(-1, *[1] * (weight.dim() - 1))
        integers = torch.round(round_weight(weight, scale, self.bits) / steps).to(torch.int8)
        if self.bits == 8:
            self.register_buffer("weight", integers)
        else:
            self.weight = PackedInt4(integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", bias_scale)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
        integers = self.weight() if isinstance(self.weight, PackedInt4) else self.weight
        weight = dequantize(integers, self.scale, self.zero, 0, *WEIGHT_RANGES[self.bits], torch.int8)
        if self.bias is None or self.bias_scale is None:
            return weight, self.bias
        return weight, dequantize(self.bias, self.bias_scale, self.zero, 0, -(2**31), 2**31 - 1, torch.int32)


def int8_layer(layer: QuantConv2d | QuantLinear) -> nn.Module:
    """Return the integer layer that computes what a rounding `layer` computes."""
    with torch.no_grad():
        weights = Int8Weights(layer)
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
