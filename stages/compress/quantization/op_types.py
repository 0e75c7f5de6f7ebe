"""Classify the nodes of a torch.fx graph for INT8: integer arithmetic, moves of values, or float operations."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.fx_trace import Probe, module_of

Kind = Literal["int8", "rectifier", "same", "move", "float"]
STAYS_FLOAT = "stays_float"
"""The key of the mark in a node's meta."""

# By kind: module types, and equivalent functions and methods, these by name.
OPERATIONS: dict[Kind, tuple[tuple[type, ...], set[Any]]] = {
    "int8": (
        (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        {
            *(operator.add, operator.iadd, torch.add, "add", "add_", operator.mul, operator.imul, torch.mul, "mul"),
            *("mul_", torch.cat, torch.concat, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"),
        },
    ),
    "rectifier": ((nn.ReLU, nn.ReLU6), {F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_"}),
    "same": ((Probe, nn.Identity, nn.Dropout, nn.Dropout2d), {F.dropout, F.dropout2d, "contiguous", "clone"}),
    "move": (
        (nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.PixelShuffle, nn.ChannelShuffle),
        {
            *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
            *(torch.max_pool2d, F.max_pool2d, torch.chunk, torch.split, operator.getitem),
            *(F.channel_shuffle, F.pixel_shuffle, "flatten", "reshape", "view", "permute", "transpose"),
            *("squeeze", "unsqueeze", "chunk", "split", "expand"),
        },
    ),
}


def kind_of(traced: fx.GraphModule, node: fx.Node) -> Kind:
    """Classify a node by how it treats its first input.

    - int8: computes, and onnxruntime has an integer kernel for it; its output gets its own range.
    - rectifier: cuts off the negative values; an int8 producer that only feeds it does so at no cost.
    - same: returns the very values (in eval mode).
    - move: returns the values in another order, or some of them; they keep their range.
    - float: everything else, and what `mark_float` marked.
    """
    return "float" if node.meta.get(STAYS_FLOAT) else unmarked_kind_of(traced, node)


def unmarked_kind_of(traced: fx.GraphModule, node: fx.Node) -> Kind:
    """Classify a node, ignoring marks of `mark_float`."""
    module = module_of(traced, node)
    for kind, (modules, functions) in OPERATIONS.items():
        if isinstance(module, modules) or (node.op in ("call_function", "call_method") and node.target in functions):
            return kind
    return "move" if _pads_with_zeros(node) else "float"


def _pads_with_zeros(node: fx.Node) -> bool:
    """Return whether a node adds zeros around its input: every range includes them."""
    named = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    return bool(node.target is F.pad and named.get("mode", "constant") == "constant" and not named.get("value"))


def is_float_tensor(node: fx.Node) -> bool:
    """Return whether a node of a traced model returns one floating-point tensor (not a size or a tuple)."""
    meta = node.meta.get("tensor_meta")
    return isinstance(meta, TensorMetadata) and meta.dtype.is_floating_point


def mark_float(node: fx.Node, stays: bool = True) -> None:
    """Mark a node so that `kind_of` returns float for it, or remove the mark."""
    node.meta[STAYS_FLOAT] = stays


def origin(traced: fx.GraphModule, node: fx.Node, *, through: tuple[Kind, ...] = ("same", "move")) -> fx.Node:
    """Return the node that produced the values of `node`, looking back through moves."""
    while kind_of(traced, node) in through and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_max_pool(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is a max pool over maps [B, C, H, W]."""
    return isinstance(module_of(traced, node), nn.MaxPool2d) or node.target in (F.max_pool2d, torch.max_pool2d)


def pool_window(traced: fx.GraphModule, node: fx.Node) -> tuple[int, int] | None:
    """Return the height and width of the equal windows over which a node averages maps [B, C, H, W], or None.

    Covers the mean over both axes and adaptive pooling to a size that divides the map's.
    """
    adaptive = isinstance(module_of(traced, node), nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d
    if not adaptive and node.target not in (torch.mean, "mean"):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_float_tensor(source) or len(source.meta["tensor_meta"].shape) != 4:
        return None
    height, width = source.meta["tensor_meta"].shape[2:]
    if not adaptive:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        is_map = isinstance(axes, tuple | list) and sorted(int(axis) % 4 for axis in axes) == [2, 3]
        return (height, width) if is_map else None
    out_height, out_width = node.meta["tensor_meta"].shape[2:]
    divides = height % out_height == 0 and width % out_width == 0
    return (height // out_height, width // out_width) if divides else None
