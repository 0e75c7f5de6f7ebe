"""Trace a model with torch.fx so that hooks on containers still work: `layer2` keeps its path and its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from kdpipe.stages.errors import ModelError, cause

Traced = TypeVar("Traced", bound=fx.GraphModule)


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


class ContainerTracer(fx.Tracer):
    """A torch.fx tracer that also calls a container's path on the container's output."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: set[str] = set()
        self.innermost: list[tuple[str, str]] = []  # (path, class) of the modules trace_scope, the deepest last

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.innermost.append((path, type(m).__name__))
        output = super().call_module(m, forward, args, kwargs)
        self.innermost.pop()
        # Anything but a single tensor cannot be passed on without changing how its caller unpacks it.
        if isinstance(output, fx.Proxy) and not self.is_leaf_module(m, path):
            self.containers.add(path)
            output = self.create_proxy("call_module", path, (output,), {})
        return output


def trace(model: nn.Module, example: Tensor, graph_class: type[Traced]) -> Traced:
    """Trace `model`'s forward in eval mode as a `graph_class`, keeping its module paths.

    The nodes carry tensor shapes for `example` [B, C, H, W] (`node.meta["tensor_meta"]`). The model must not be used
    afterwards: its modules become part of the graph module.

    Raises:
        ModelError: If the forward cannot be traced (the message names the module) or does not run on `example`.
    """
    model.eval()  # a forward that depends on self.training is traced as in eval mode
    tracer = ContainerTracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        path, kind = tracer.innermost[-1] if tracer.innermost else ("", type(model).__name__)
        raise ModelError(_untraceable(path, kind, error)) from error
    for path in tracer.containers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Probe(model.get_submodule(path)))
    traced = graph_class(model, graph)
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception as error:
        raise ModelError(
            f"the model does not run on an input of shape {list(example.shape)}: {cause(error)}"
        ) from error
    return traced


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _untraceable(path: str, kind: str, error: BaseException) -> str:
    where = f"its module {path!r} ({kind})" if path else f"its forward ({kind})"
    return (
        f"the model cannot be quantized: torch.fx cannot trace {where}: {cause(error).rstrip('.')}; "
        "write it without Python branches on tensor values, or remove quantize from compress.steps."
    )
