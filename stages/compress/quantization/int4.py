"""INT4 weights for linear layers, everything else float: for students dominated by linear weights.

    prepared = prepare_int4(student, example)     # fine-tune it like any other model, or not at all
    export_onnx(prepared, ...)                    # com.microsoft::MatMulNBits, half a byte per weight

Each run of `block_size` weights along an output's inputs has one scale: its weight of largest magnitude, with its sign,
over -8, so that this one is exact and all 16 values, -8 to 7, are in use (the grid of onnxruntime's own symmetric
MatMulNBits quantizer). There is nothing to calibrate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.exportable import replace_modules
from kdpipe.stages.models.clone import clone_without_hooks, preserve_modes
from kdpipe.stages.models.hooks import capture, get_module, model_errors

BITS = 4
LOWEST, HIGHEST = -8, 7
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""The block sizes that onnxruntime's kernel supports."""


class Int4Linear(nn.Linear):
    """A linear layer whose weight [O, I] is rounded to INT4 in blocks on every call; the bias stays float.

    The gradient passes straight through the rounding.
    """

    def __init__(self, layer: nn.Linear, block_size: int) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.block_size = block_size
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            weight = dequantize_int4(*quantize_int4(self.weight.detach(), self.block_size), self.in_features)
            # The rounded weight comes first: added to zero it stays exact, as in the file.
            return F.linear(input.float(), weight + (self.weight - self.weight.detach()), self.bias)

    def for_export(self) -> PackedLinear:
        return PackedLinear(self)


class PackedLinear(nn.Module):
    """An Int4Linear with two weights per byte; torch's exporter writes it as MatMulNBits.

    Attributes:
        packed: uint8 [O, num_blocks, block_size / 2], the earlier weight in the lower half, 8 standing for zero.
        scales: float32 [O, num_blocks].
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int4Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block_size = layer.in_features, layer.out_features, layer.block_size
        integers, scales = quantize_int4(layer.weight.detach().float(), layer.block_size)
        nibbles = (integers - LOWEST).to(torch.uint8)
        self.register_buffer("packed", nibbles[..., 0::2] | (nibbles[..., 1::2] << BITS))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        output = self._symbolic(x) if torch.onnx.is_in_onnx_export() else self._compute(x)
        return output if self.bias is None else output + self.bias

    def _symbolic(self, x: Tensor) -> Tensor:
        output: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scales),
            {"K": self.in_features, "N": self.out_features, "bits": BITS, "block_size": self.block_size},
            dtype=torch.float32,
            shape=[*x.shape[:-1], self.out_features],
            version=1,
        )
        return output

    def _compute(self, x: Tensor) -> Tensor:
        nibbles = torch.stack([self.packed & 15, self.packed >> BITS], dim=-1).flatten(2)
        return F.linear(x, dequantize_int4(nibbles.float() + LOWEST, self.scales, self.in_features))


def quantize_int4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Round a weight [O, I] to integers -8 to 7, float32 [O, num_blocks, block_size], with scales [O, num_blocks].

    The last block is padded with zeros. A block of zeros has the scale 1.
    """
    num_blocks = -(-weight.shape[1] // block_size)
    padded = F.pad(weight.float(), (0, num_blocks * block_size - weight.shape[1]))
    blocks = padded.view(len(weight), num_blocks, block_size)
    highest, lowest = blocks.amax(dim=2), blocks.amin(dim=2)
    scales = torch.where(highest > -lowest, highest, lowest) / LOWEST
    scales = torch.where(scales.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
    return torch.round(blocks / scales.unsqueeze(2)).clamp(LOWEST, HIGHEST), scales


def dequantize_int4(integers: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """Return the weight [O, I] of integers [O, num_blocks, block_size] and scales [O, num_blocks]."""
    return (integers * scales.unsqueeze(2)).flatten(1)[:, :in_features]


def prepare_int4(model: nn.Module, example: Tensor, *, block_size: int = 32, exclude: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `model` whose linear layers round their weights to INT4 on every call.

    Module paths, parameters and state_dict keys are those of `model`, which stays unchanged; forward hooks are not
    copied. Layers of fewer than `block_size` inputs stay float, as do those whose weights a forward reads without
    calling them (nn.MultiheadAttention), found by running `example` [B, C, H, W], and the modules in `exclude`.

    Raises:
        ModelError: If `block_size` is not supported, the model does not run on `example`, `exclude` names a missing
            module or one without a layer to round, or no layer is left to round.
    """
    if block_size not in BLOCK_SIZES:
        raise ModelError(f"block_size = {block_size} is not supported by INT4: choose one of {BLOCK_SIZES}.")
    copy = clone_without_hooks(model)
    layers = {layer for layer in _called_linears(copy, example) if layer.in_features >= block_size}
    excluded: set[nn.Module] = set()
    for path in exclude:
        inside = layers.intersection(get_module(copy, path).modules())
        if not inside:
            raise ModelError(f"quantize.exclude names {path!r}, which has no layer that INT4 would round: remove it.")
        excluded |= inside
    if not layers - excluded:
        left = " left" if excluded else ""
        raise ModelError(
            f"the model has no linear layer{left} of {block_size} inputs or more to round to INT4: set "
            "compress.quantize.scheme = 'int8', or a smaller block_size."
        )
    replace_modules(copy, {layer: Int4Linear(layer, block_size) for layer in layers - excluded})
    return copy


def _called_linears(model: nn.Module, example: Tensor) -> list[nn.Linear]:
    """Return the plain linear layers that a forward of `model` calls in eval mode; the modes stay."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and module is not model]
    with model_errors(example), preserve_modes(model), torch.no_grad(), capture(layers) as outputs:
        model.eval()(example.to(next(model.parameters(), example).device))
    return [layer for layer in layers if outputs[layer]]
