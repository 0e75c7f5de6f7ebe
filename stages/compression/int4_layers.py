"""INT4 weights for linear layers, all else float: for students whose file or memory traffic is mostly linear weights.

    prepared = prepare_int4(student, example)     # fine-tune it as any other model, or not at all
    export_onnx(prepared, ...)                    # com.microsoft::MatMulNBits, half a byte a weight

Each run of `block_size` weights along an output's inputs has one scale: its weight of largest magnitude over -8, sign
and all, so that this one is exact and all 16 values, -8 to 7, are in use (the grid of onnxruntime's own symmetric
MatMulNBits quantizer). There is nothing to calibrate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.compression.bare_copy import bare_copy
from stages.errors import ModelError, cause
from stages.models.module_path import module_named

BITS = 4
LOWEST, HIGHEST = -8, 7
BLOCK_SIZES = (16, 32, 64, 128, 256)  # what onnxruntime's kernel can do


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
            weight = read_int4(*round_to_int4(self.weight.detach(), self.block_size), self.in_features)
            # The rounded weight comes first: added to a zero it stays exact, as the file has it.
            return F.linear(input.float(), weight + (self.weight - self.weight.detach()), self.bias)


class PackedLinear(nn.Module):
    """What an Int4Linear computes, from two weights a byte; torch's exporter writes it as MatMulNBits.

    packed: uint8 [O, num_blocks, block_size / 2], the earlier weight in the lower half, 8 standing for zero.
    scales: float32 [O, num_blocks].
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int4Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block_size = layer.in_features, layer.out_features, layer.block_size
        whole, scales = round_to_int4(layer.weight.detach().float(), layer.block_size)
        halves = (whole - LOWEST).to(torch.uint8)
        self.register_buffer("packed", halves[..., 0::2] | (halves[..., 1::2] << BITS))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        output = self._write(x) if torch.onnx.is_in_onnx_export() else self._compute(x)
        return output if self.bias is None else output + self.bias

    def _write(self, x: Tensor) -> Tensor:
        sizes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "bits": BITS,
            "block_size": self.block_size,
        }
        output: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scales),
            sizes,
            dtype=torch.float32,
            shape=[*x.shape[:-1], self.out_features],
            version=1,
        )
        return output

    def _compute(self, x: Tensor) -> Tensor:
        halves = torch.stack([self.packed & 15, self.packed >> BITS], dim=-1).flatten(2)
        return F.linear(x, read_int4(halves.float() + LOWEST, self.scales, self.in_features))


def round_to_int4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """A weight [O, I] as whole numbers -8 to 7, float32 [O, num_blocks, block_size], and their scales [O, num_blocks].

    The last block is filled up with zeros. A block of zeros has the scale 1.
    """
    num_blocks = -(-weight.shape[1] // block_size)
    filled = F.pad(weight.float(), (0, num_blocks * block_size - weight.shape[1]))
    blocks = filled.view(len(weight), num_blocks, block_size)
    highest, lowest = blocks.amax(dim=2), blocks.amin(dim=2)
    scales = torch.where(highest > -lowest, highest, lowest) / LOWEST
    scales = torch.where(scales.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
    return torch.round(blocks / scales.unsqueeze(2)).clamp(LOWEST, HIGHEST), scales


def read_int4(whole: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The weight [O, I] that whole numbers [O, num_blocks, block_size] and scales [O, num_blocks] stand for."""
    return (whole * scales.unsqueeze(2)).flatten(1)[:, :in_features]


def prepare_int4(
    model: nn.Module, example: Tensor, *, block_size: int = 32, keep_float: Sequence[str] = ()
) -> nn.Module:
    """A copy of `model` whose linear layers round their weights to INT4 on every call; `model` stays as it is.

    Module paths, parameters and state_dict keys are those of `model`; forward hooks are not copied. Float stay layers
    of fewer than `block_size` inputs, those at or in the modules that `keep_float` names, and those whose weights a
    forward reads without calling them (nn.MultiheadAttention), which a run on `example` [B, C, H, W] tells. Raises
    ModelError if `block_size` is none of 16, 32, 64, 128, 256, if the model does not run on `example`, if `keep_float`
    names what is not there or holds nothing to quantize, and if nothing is left to quantize.
    """
    if block_size not in BLOCK_SIZES:
        raise ModelError(f"block_size = {block_size} is not possible for INT4: wanted is one of {BLOCK_SIZES}.")
    copy = bare_copy(model)
    layers = {layer for layer in _called_linears(copy, example) if layer.in_features >= block_size}
    spared: set[nn.Module] = set()
    for path in keep_float:
        inside = layers.intersection(module_named(copy, path).modules())
        if not inside:
            raise ModelError(f"keep_float names {path!r}, which holds nothing that INT4 would round: leave it out.")
        spared |= inside
    if not layers - spared:
        raise ModelError(
            f"the model has no linear layer{' left' if spared else ''} of {block_size} inputs or more to round to INT4."
        )
    _replace(copy, {layer: Int4Linear(layer, block_size) for layer in layers - spared})
    return copy


def int4_portable(model: nn.Module) -> nn.Module:
    """A copy of `model`, on the CPU in eval mode, whose Int4Linear layers hold packed weights and export as
    MatMulNBits; a model without such layers is merely copied."""
    copy = bare_copy(model).cpu().eval()
    _replace(copy, {layer: PackedLinear(layer).eval() for layer in copy.modules() if isinstance(layer, Int4Linear)})
    return copy


def _called_linears(model: nn.Module, example: Tensor) -> Iterator[nn.Linear]:
    """The plain linear layers that a forward of `model` on `example` calls in eval mode; the modes stay."""
    called: dict[nn.Linear, None] = {}
    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(lambda layer, inputs, output: called.setdefault(layer))
        for module in modes
        if type(module) is nn.Linear and module is not model
    ]
    try:
        with torch.no_grad():
            model.eval()(example.to(next(model.parameters(), example).device))
    except Exception as fault:
        raise ModelError(
            f"the model does not run on an input of shape {list(example.shape)}: {cause(fault)}"
        ) from fault
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return iter(called)


def _replace(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Put each successor wherever its layer stands, at every path of a shared one."""
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in successors:
            model.set_submodule(path, successors[layer])
