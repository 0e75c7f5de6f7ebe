"""Tracers of torch.fx: with hooks on containers, and for networks that branch on shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.compress.quantization.timm_layers import is_timm_layer


class ContainerTracer(fx.Tracer):
    """A torch.fx tracer that also calls a container's path on the container's output."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: set[str] = set()
        self.innermost: list[tuple[str, str]] = []  # (path, class) of the running modules, the deepest last

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_timm_layer(m) or super().is_leaf_module(m, module_qualified_name)

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


class ShapedProxy(fx.Proxy):
    """A traced value with its shape: numbers but for the first axis, which may be the batch."""

    @property
    def value(self) -> Any:
        """What the value is for the example."""
        return self.tracer.values[self.node]  # type: ignore[attr-defined]

    @property
    def shape(self) -> tuple[Any, ...]:
        is_batch = self.node.op != "get_attr"  # a parameter has none
        first = self.tracer.create_proxy("call_method", "size", (self, 0), {}) if is_batch else self.value.shape[0]
        return (first, *self.value.shape[1:]) if self.value.dim() else ()

    def size(self, axis: int | None = None) -> Any:
        """Return the shape, or the length of an axis."""
        return self.shape if axis is None else self.shape[axis]

    def to(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Return the value itself where it is of that type already."""
        if self.value.to(*args, **kwargs) is self.value:
            return self
        return self.tracer.create_proxy("call_method", "to", (self, *args), kwargs)

    def dim(self) -> int:
        return int(self.value.dim())

    ndim = property(dim)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, tuple | list):
            own: Any = self
            return iter([own[number] for number in range(len(self.value))])
        return super().__iter__()


class ShapedTracer(ContainerTracer):
    """A tracer that also computes each value for an example, so that Python can branch on shapes.

    It traces transformers' networks.

    What a forward reads of shapes other than the first axis is fixed in the graph: it is for images of this size.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.values: dict[fx.Node, Any] = {}
        self.computing = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> ShapedProxy:
        return ShapedProxy(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        self.computing = True
        try:
            with torch.no_grad():
                self._known(proxy.node)
        finally:
            self.computing = False
        return proxy

    def _known(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._known)
        if node.op == "placeholder":
            return args[0] if args else self.example
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(path), name)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module: nn.Module = self.root.get_submodule(str(node.target))
        return module(*args, **kwargs) if self.is_leaf_module(module, str(node.target)) else args[0]
