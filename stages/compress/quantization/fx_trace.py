"""Trace a model with torch.fx, with working hooks on containers, and fold its batch norms.

Hooks on containers: `layer2` keeps its path and its output.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from kdpipe.stages.compress.quantization.timm_layers import plain_layers
from kdpipe.stages.compress.quantization.tracers import ContainerTracer, ShapedTracer
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.hooks import model_errors

Traced = TypeVar("Traced", bound=fx.GraphModule)


class UntraceableError(ModelError):
    """A network that torch.fx cannot trace.

    Attributes:
        reason: The module, and why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the model cannot be quantized: torch.fx cannot trace {reason}; write it without Python branches on "
            "tensor values, or remove quantize from compress.steps."
        )


class Probe(nn.Module):
    """An identity at a container's path, which fires the hooks on that path.

    torch.fx inlines the forward of a container (a block, a stage) into its caller's, and never calls the container. A
    probe takes over the container's modules and parameters, so that no parameter changes its name.
    """

    def __init__(self, container: nn.Module) -> None:
        super().__init__()
        self._modules = container._modules
        self._parameters = container._parameters
        self._buffers = container._buffers
        self._non_persistent_buffers_set = container._non_persistent_buffers_set

    def forward(self, output: Any) -> Any:
        return output


def trace(model: nn.Module, example: Tensor, graph_class: type[Traced]) -> Traced:
    """Trace `model`'s forward in eval mode as a `graph_class`, keeping its module paths.

    One that branches on shapes is traced for images of the size of `example`.

    The nodes carry tensor shapes for `example` [B, C, H, W] (`node.meta["tensor_meta"]`). The model must not be used
    afterwards: its modules become part of the graph module.

    Raises:
        UntraceableError: If the forward cannot be traced; the message names the module.
        ModelError: If it does not run on `example`.
    """
    model.eval()  # a forward that depends on self.training is traced as in eval mode
    tracer = ContainerTracer()
    try:
        graph = tracer.trace(model)
    except Exception as plain:
        tracer = ShapedTracer(example)
        try:
            graph = tracer.trace(model)
        except Exception as error:
            path, kind = tracer.innermost[-1] if tracer.innermost else ("", type(model).__name__)
            where = f"its module {path!r} ({kind})" if path else f"its forward ({kind})"
            raise UntraceableError(f"{where}: {cause(error).rstrip('.')}") from plain
    for path in tracer.containers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Probe(model.get_submodule(path)))
    traced = graph_class(model, graph)
    if isinstance(tracer, ShapedTracer):
        traced.graph.eliminate_dead_code()  # reads of weights for their type, of shapes that are known
        traced.recompile()
    with model_errors(example), torch.no_grad():
        ShapeProp(traced).propagate(example)
    plain_layers(traced)
    return traced


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


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
