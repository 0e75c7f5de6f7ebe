"""Fold batch norms into the preceding convolutions and linear layers."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from kdpipe.stages.compress.quantization.fx_trace import Probe, module_of


def fold_batchnorms(traced: fx.GraphModule) -> None:
    """Fold each batch norm, with its running statistics, into the convolution or linear layer that only it reads.

    The batch norm's path keeps an identity, so hooks there see the same values; a hook on the layer itself sees
    normalized values from now on. A batch norm over maps [B, C, H, W] that follows anything else (pre-activation
    networks) becomes a depthwise 1x1 convolution: one weight per channel, which INT8 represents exactly.
    """
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        norm = module_of(traced, node)
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
            continue
        source = _source_read_once(traced, node)
        layer = module_of(traced, source)
        is_called_once = calls[node.target] == 1 and calls[source.target] == 1
        has_channels_second = len(node.meta["tensor_meta"].shape) in (2, 4)  # else a linear layer writes the last axis
        if is_called_once and has_channels_second and _fold(layer, norm):
            traced.set_submodule(str(node.target), nn.Identity())
        elif isinstance(norm, nn.BatchNorm2d):
            traced.set_submodule(str(node.target), _as_depthwise(norm))


def _source_read_once(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node that feeds only `node`, looking through probes and identities; else `node` itself."""
    source = node.args[0]
    while isinstance(source, fx.Node) and len(source.users) == 1:
        if not isinstance(module_of(traced, source), Probe | nn.Identity):
            return source
        source = source.args[0]
    return node


def _fold(layer: nn.Module | None, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    """Fold `norm` into `layer` if that is a plain convolution or linear layer; return whether it was."""
    assert norm.running_mean is not None and norm.running_var is not None
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    scale = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    if type(layer) is nn.Conv2d:
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, scale, shift)
    elif type(layer) is nn.Linear:
        layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics, scale, shift)
    else:
        return False
    layer.bias.requires_grad_(layer.weight.requires_grad)  # torch freezes a bias that was not there before
    return True


def _as_depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return the depthwise 1x1 convolution that computes what `norm` does in eval mode."""
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features, bias=False)
    nn.init.ones_(conv.weight)
    _fold(conv.to(norm.running_mean), norm)
    return conv
