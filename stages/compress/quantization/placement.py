"""Decide where a traced network computes in INT8 and where in float, and place the activation quantizers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx, nn

from kdpipe.stages.compress.quantization.fake_quant import ActivationQuantizer, QuantConv2d, QuantLinear
from kdpipe.stages.compress.quantization.fx_trace import module_of
from kdpipe.stages.compress.quantization.op_types import (
    Kind,
    is_float_tensor,
    is_max_pool,
    kind_of,
    mark_float,
    origin,
    unmarked_kind_of,
)
from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.hooks import get_module

QUANTIZERS = "quantizers"
"""The path of the activation quantizers; each is named after the node whose output it rounds."""


def rounded_nodes(traced: fx.GraphModule, model: nn.Module, logits: fx.Node, exclude: Sequence[str]) -> list[fx.Node]:
    """Return the nodes, except `logits`, whose values INT8 operations read or write; mark what stays float.

    Marks of an earlier call are reset. `exclude` has paths of `model`, the network before tracing.

    Raises:
        ModelError: For a path that does not exist or has no INT8 operations.
    """
    logits = origin(traced, logits)
    _mark_float_work(traced, model, exclude)
    return [node for node in traced.graph.nodes if node is not logits and _needs_rounding(traced, node)]


def quantizer_path(node: fx.Node) -> str:
    """Return the path of the quantizer that rounds the values of a node."""
    return f"{QUANTIZERS}.{node.name}{'_' if hasattr(nn.Module, node.name) else ''}"  # a node of x.float() is "float"


def place_quantizers(traced: fx.GraphModule, nodes: Sequence[fx.Node], device: torch.device, grid: Grid) -> None:
    """Insert an activation quantizer after each of `nodes`, or after the max pools that alone read its float values.

    It is named after the node in either case. A maximum is the same before and after rounding.
    """
    traced.add_submodule(QUANTIZERS, nn.Module())
    for node in nodes:
        traced.add_submodule(quantizer_path(node), ActivationQuantizer(grid).to(device))
        insert_after(traced, _after_max_pools(traced, node), quantizer_path(node))


def quantizers_after(prepared: fx.GraphModule, node: fx.Node) -> list[ActivationQuantizer]:
    """Return the quantizers of a prepared model that round the output of `node`, after any rectifier and moves."""
    found: list[ActivationQuantizer] = []
    for user in node.users:
        module = module_of(prepared, user)
        if isinstance(module, ActivationQuantizer):
            found.append(module)
        elif unmarked_kind_of(prepared, user) in ("same", "move", "rectifier"):
            found += quantizers_after(prepared, user)
    return found


def grid_of(prepared: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """Return the quantizer on whose grid the values of `node` are, or None if they are plain floats."""
    module = module_of(prepared, origin(prepared, node))
    return module if isinstance(module, ActivationQuantizer) else None


def set_input_grids(prepared: fx.GraphModule) -> None:
    """Set on each rounding layer the quantizer of its inputs, which determines the scale of its bias.

    None if its calls read different grids, or plain floats; also for a linear layer over more axes than [B, F], which
    is a product and a float addition in ONNX.
    """
    grids: dict[QuantConv2d | QuantLinear, set[ActivationQuantizer | None]] = {}
    for node in prepared.graph.nodes:
        layer = module_of(prepared, node)
        if isinstance(layer, QuantConv2d | QuantLinear):
            is_fused = isinstance(layer, QuantConv2d) or len(node.args[0].meta["tensor_meta"].shape) == 2
            grids.setdefault(layer, set()).add(grid_of(prepared, node.args[0]) if is_fused else None)
    for layer, found in grids.items():
        grid = next(iter(found)) if len(found) == 1 else None
        layer.input_grid = None if grid is None else (grid,)


def _after_max_pools(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the last of the max pools that alone read the float values of `node`; `node` itself if there is none.

    onnxruntime has a fast pool for the output of an integer kernel, and a slow one after a QuantizeLinear, which keeps
    the float kernels' layout (60 times slower on ResNet-18's stem).
    """
    place = reader = node
    while kind_of(traced, node) == "float" and len(reader.users) == 1:
        (reader,) = reader.users
        if is_max_pool(traced, reader) and is_float_tensor(reader):
            place = reader
        elif kind_of(traced, reader) != "same":
            break
    return place


def insert_after(traced: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Insert a call of the module at `path` after `node`, and redirect all readers to it."""
    with traced.graph.inserting_after(node):
        rounded = traced.graph.call_module(path, (node,))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    rounded.meta = dict(node.meta)


def _mark_float_work(traced: fx.GraphModule, model: nn.Module, exclude: Sequence[str]) -> None:
    """Mark what stays float although INT8 could compute it.

    That is the operations of the modules at `exclude`; joins (additions, products, ...) between float operations; and
    rectifiers of float values. A functional operation belongs to the modules in whose forward it is.
    """
    for node in traced.graph.nodes:
        mark_float(node, False)
    excluded = [node for path in exclude for node in _int8_nodes_in(traced, model, path)]
    for node in [*excluded, *_joins_in_float(traced, excluded)]:
        mark_float(node)
    for node in traced.graph.nodes:
        if kind_of(traced, node) == "rectifier" and _from_float(traced, node.args[0]):
            mark_float(node)


def _int8_nodes_in(traced: fx.GraphModule, model: nn.Module, path: str) -> list[fx.Node]:
    """Return the INT8 nodes inside the module of `model` at `path`. Raises ModelError if there are none."""
    inside = {id(module) for module in get_module(model, path).modules()}
    int8_nodes = [node for node in traced.graph.nodes if kind_of(traced, node) == "int8" and is_float_tensor(node)]
    found = [node for node in int8_nodes if any(id(module) in inside for module in _modules_around(model, node))]
    if not found:
        raise ModelError(f"quantize.exclude names {path!r}, which has no operation that INT8 would compute: remove it.")
    return found


def _modules_around(model: nn.Module, node: fx.Node) -> Iterator[nn.Module]:
    """Yield the modules in whose forward a node is; the one that it calls is among them."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield model.get_submodule(path)


def _joins_in_float(traced: fx.GraphModule, excluded: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the joins that read a float value and are read only by float operations.

    In integers they would cost a rounding before and after, for values that no integer kernel reads: a transformer's
    residual stream.
    """
    joins = [node for node in traced.graph.nodes if _is_join(traced, node) and node not in excluded]
    floats = {*excluded, *joins}  # candidates; those with a reason not to stay float are removed until none is left
    while removed := [node for node in joins if node in floats and not _is_in_float(traced, node, floats)]:
        floats.difference_update(removed)
    return [node for node in joins if node in floats]


def _is_join(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is an INT8 operation without weights."""
    is_layer = isinstance(module_of(traced, node), nn.Conv2d | nn.Linear)
    return kind_of(traced, node) == "int8" and is_float_tensor(node) and not is_layer


def _is_in_float(traced: fx.GraphModule, node: fx.Node, floats: set[fx.Node]) -> bool:
    """Return whether a node reads a value of a float operation and is read only by float operations."""
    sources = [source for source in node.all_input_nodes if is_float_tensor(source)]
    readers = _readers(traced, node, ("same", "move", "rectifier"))
    return any(_from_float(traced, source, floats) for source in sources) and all(
        kind_of(traced, reader) == "float" or reader in floats for reader in readers
    )


def _from_float(traced: fx.GraphModule, node: fx.Node, floats: Collection[fx.Node] = ()) -> bool:
    """Return whether a float operation, or a node of `floats`, produced `node`, before any moves and rectifiers."""
    source = origin(traced, node, through=("same", "move", "rectifier"))
    return kind_of(traced, source) == "float" or source in floats


def _needs_rounding(traced: fx.GraphModule, node: fx.Node) -> bool:
    kind = kind_of(traced, node)
    if kind in ("same", "move") or not is_float_tensor(node):
        return False
    nearest = _readers(traced, node, ("same",))
    if kind == "int8" and len(nearest) == 1 and kind_of(traced, nearest[0]) == "rectifier":
        return False  # the rectifier's output is rounded instead
    # Integer kernels of convolutions and joins write only integers; that of linear layers can write float.
    if kind == "rectifier" or (kind == "int8" and not isinstance(module_of(traced, node), nn.Linear)):
        return True
    readers = _readers(traced, node, ("same", "move"))
    return any(kind_of(traced, reader) in ("int8", "rectifier") for reader in readers)


def _readers(traced: fx.GraphModule, node: fx.Node, through: tuple[Kind, ...]) -> list[fx.Node]:
    """Return the nodes that read `node`'s values, looking through nodes of the given kinds."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(traced, user, through) if kind_of(traced, user) in through else [user]
    return found
