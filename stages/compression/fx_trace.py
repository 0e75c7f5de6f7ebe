"""A model's torch.fx graph in which containers still exist: a hook on `layer2` hears `layer2`'s output, as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from stages.errors import ModelError, cause


class Probe(nn.Module):
    """Stands at a container's path and passes the container's output through, so that hooks on the path fire.

    torch.fx writes the forward of a container (a block, a stage) out into its caller's, and the container is never
    called again. A probe holds what the container held, so that no parameter changes its name.
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
    """torch.fx's tracer, which also calls a container's path on the container's output."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: set[str] = set()
        self.innermost: list[tuple[str, str]] = []  # (path, class) of the modules entered, the deepest last

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.innermost.append((path, type(m).__name__))
        output = super().call_module(m, forward, args, kwargs)
        self.innermost.pop()
        # What is no single tensor cannot be passed on without changing how its caller unpacks it.
        if isinstance(output, fx.Proxy) and not self.is_leaf_module(m, path):
            self.containers.add(path)
            output = self.create_proxy("call_module", path, (output,), {})
        return output


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of `model`'s forward in eval mode, its module paths kept, tensor shapes for `example` [B, C, H, W] on
    its nodes (`node.meta["tensor_meta"]`). The model is used up: its modules live on in the graph module.

    Raises ModelError, naming the module, if the forward cannot be traced or does not run on `example`.
    """
    model.eval()  # a forward that asks for self.training is written out as it runs in eval mode
    tracer = ContainerTracer()
    try:
        graph = tracer.trace(model)
    except Exception as fault:
        path, kind = tracer.innermost[-1] if tracer.innermost else ("", type(model).__name__)
        raise ModelError(_untraceable(path, kind, fault)) from fault
    for path in tracer.containers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Probe(model.get_submodule(path)))
    traced = fx.GraphModule(model, graph)
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception as fault:
        raise ModelError(
            f"the model does not run on an input of shape {list(example.shape)}: {cause(fault)}"
        ) from fault
    return traced


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _untraceable(path: str, kind: str, fault: BaseException) -> str:
    where = f"its module {path!r} ({kind})" if path else f"its forward ({kind})"
    return (
        f"the model cannot be quantized: torch.fx cannot trace {where}: {cause(fault).rstrip('.')}; "
        "write it without Python decisions on tensor values, or leave the student in float."
    )
