"""Layers of timm as the plain layers that INT8 knows: norms with an activation inside, and "same" padding."""

from __future__ import annotations

import sys
from typing import Any

from torch import fx, nn
from torch.nn import functional as F


def is_timm_layer(module: nn.Module) -> bool:
    """Return whether `plain_layers` replaces calls of a module, which a tracer must keep whole."""
    return isinstance(module, _types())


def plain_layers(traced: fx.GraphModule) -> None:
    """Replace each call of a layer of timm, in place; the nodes carry shapes.

    A BatchNormAct2d at `bn` becomes its children `bn.norm` (a BatchNorm2d), `bn.drop` and `bn.act`, and an identity at
    `bn` on which hooks fire. A Conv2dSame becomes a padding, for images of this size, and a Conv2d at its path.
    """
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_timm_layer(module):
            if isinstance(module, nn.Conv2d):
                _pad_before(traced, node, module)
            else:
                _norm_then_act(traced, node, module)
    traced.recompile()


def _types() -> tuple[type[nn.Module], ...]:
    layers: Any = sys.modules.get("timm.layers")  # not imported: there are none of its layers then
    return () if layers is None else (layers.BatchNormAct2d, layers.Conv2dSame)


def _pad_before(traced: fx.GraphModule, node: fx.Node, same: nn.Conv2d) -> None:
    from timm.layers.padding import pad_same_arg

    source: Any = node.args[0]
    size = list(source.meta["tensor_meta"].shape[2:])
    padding = pad_same_arg(size, list(same.kernel_size), list(same.stride), list(same.dilation))
    if any(padding):
        with traced.graph.inserting_before(node):
            padded = traced.graph.call_function(F.pad, (source, tuple(padding)))
        padded.meta = dict(source.meta)
        node.args = (padded,)
    settings: dict[str, Any] = {key: getattr(same, key) for key in ("kernel_size", "stride", "dilation", "groups")}
    plain = nn.Conv2d(same.in_channels, same.out_channels, **settings, device="meta")
    plain.weight, plain.bias = same.weight, same.bias
    traced.set_submodule(str(node.target), plain)


def _norm_then_act(traced: fx.GraphModule, node: fx.Node, both: Any) -> None:
    path = str(node.target)
    norm = nn.BatchNorm2d(both.num_features, both.eps, both.momentum, both.affine, both.track_running_stats)
    norm._parameters, norm._buffers, norm.training = both._parameters, both._buffers, both.training
    whole = nn.Identity()
    whole.add_module("norm", norm)
    traced.set_submodule(path, whole)
    value: Any = node.args[0]
    with traced.graph.inserting_before(node):
        for name in ("norm", "drop", "act"):
            if name != "norm":
                whole.add_module(name, getattr(both, name))
            value = traced.graph.call_module(f"{path}.{name}", (value,))
            value.meta = dict(node.meta)
    node.args = (value,)
