"""Where a traced network computes in INT8 and where in float, and which of its values are rounded for that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx, nn

from stages.compression.fake_quant import ActivationQuantizer, QuantConv2d, QuantLinear
from stages.compression.fx_trace import module_of
from stages.compression.op_kinds import Kind, could_be, is_float_tensor, is_max_pool, kind_of, origin, stay_float
from stages.errors import ModelError
from stages.models.module_path import module_named

QUANTIZERS = "quantizers"  # the activation quantizers' path; each is named after the node whose output it rounds


def rounded_nodes(
    traced: fx.GraphModule, model: nn.Module, logits: fx.Node, exclude: Sequence[str]
) -> list[fx.Node]:
    """The nodes whose values INT8 arithmetic gives or takes, save the logits; what stays float is marked so.

    `model` is the network before it was traced, whose paths `exclude` names; marks of an earlier call are forgotten.
    Raises ModelError for a path that is not there or holds no INT8 work.
    """
    logits = origin(traced, logits)
    _mark_float_work(traced, model, exclude)
    return [node for node in traced.graph.nodes if node is not logits and _wants_rounding(traced, node)]


def quantizer_path(node: fx.Node) -> str:
    """Where the quantizer stands that rounds the values of a node."""
    return f"{QUANTIZERS}.{node.name}"


def place_quantizers(traced: fx.GraphModule, nodes: Sequence[fx.Node], device: torch.device) -> None:
    """Put an activation quantizer behind each of `nodes`, or behind the max pools that alone read its float work.

    It is named after the node in either case. A maximum is the same before and after rounding.
    """
    traced.add_submodule(QUANTIZERS, nn.Module())
    for node in nodes:
        traced.add_submodule(quantizer_path(node), ActivationQuantizer().to(device))
        _call_behind(traced, _behind_max_pools(traced, node), quantizer_path(node))


def quantizers_behind(prepared: fx.GraphModule, node: fx.Node) -> list[ActivationQuantizer]:
    """The quantizers in a prepared model that round what `node` gives, after any rectifier and moves."""
    found: list[ActivationQuantizer] = []
    for user in node.users:
        module = module_of(prepared, user)
        if isinstance(module, ActivationQuantizer):
            found.append(module)
        elif could_be(prepared, user) in ("same", "move", "rectifier"):
            found += quantizers_behind(prepared, user)
    return found


def grid_of(prepared: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer on whose grid the values of `node` lie, or None if they are plain floats."""
    module = module_of(prepared, origin(prepared, node))
    return module if isinstance(module, ActivationQuantizer) else None


def tell_input_grids(prepared: fx.GraphModule) -> None:
    """Tell each rounding layer the quantizer of its inputs, in whose steps the file counts its bias.

    None if its calls read different grids, or plain floats. A linear layer over more axes than [B, F] is a product and
    an addition in ONNX, and the addition stays float: it gets none either.
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


def _behind_max_pools(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The last of the max pools that alone read the float work of `node`; `node` itself if there is none.

    onnxruntime has a fast pool for the integers that an integer kernel gives, and a slow one for those behind a
    QuantizeLinear, which keeps the float kernels' layout (it was 60 times slower on ResNet-18's stem).
    """
    place = reader = node
    while kind_of(traced, node) == "float" and len(reader.users) == 1:
        (reader,) = reader.users
        if is_max_pool(traced, reader) and is_float_tensor(reader):
            place = reader
        elif kind_of(traced, reader) != "same":
            break
    return place


def _call_behind(traced: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Have the module at `path` read `node`, and everybody else what that gives."""
    with traced.graph.inserting_after(node):
        rounded = traced.graph.call_module(path, (node,))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    rounded.meta = dict(node.meta)


def _mark_float_work(traced: fx.GraphModule, model: nn.Module, exclude: Sequence[str]) -> None:
    """Mark what stays float although INT8 could compute it.

    It is the work of the modules at `exclude`; joins (additions, products, ...) amid float work; and rectifiers of
    float values. A functional operation belongs to the modules in whose forward it stands.
    """
    for node in traced.graph.nodes:
        stay_float(node, False)
    kept = [node for path in exclude for node in _int8_work_at(traced, model, path)]
    for node in [*kept, *_joins_amid_float(traced, kept)]:
        stay_float(node)
    for node in traced.graph.nodes:
        if kind_of(traced, node) == "rectifier" and _is_float_work(traced, node.args[0]):
            stay_float(node)


def _int8_work_at(traced: fx.GraphModule, model: nn.Module, path: str) -> list[fx.Node]:
    """The INT8 nodes inside the module of `model` at `path`; ModelError if there are none."""
    inside = {id(module) for module in module_named(model, path).modules()}
    work = [node for node in traced.graph.nodes if kind_of(traced, node) == "int8" and is_float_tensor(node)]
    found = [node for node in work if any(id(module) in inside for module in _modules_around(model, node))]
    if not found:
        raise ModelError(f"exclude names {path!r}, which holds nothing that INT8 would compute: leave it out.")
    return found


def _modules_around(model: nn.Module, node: fx.Node) -> Iterator[nn.Module]:
    """The modules in whose forward a node stands, and the one that it calls."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield model.get_submodule(path)
    if node.op == "call_module":
        yield model.get_submodule(str(node.target))


def _joins_amid_float(traced: fx.GraphModule, kept: Sequence[fx.Node]) -> list[fx.Node]:
    """The joins that read a float value and are read by float work alone.

    In integers they would cost a rounding before and after, and would round what no integer kernel reads: a
    transformer's residual stream.
    """
    joins = [node for node in traced.graph.nodes if _is_join(traced, node) and node not in kept]
    floats = {*kept, *joins}  # all that may stay float: what has reason not to is struck out until no more has
    while struck := [node for node in joins if node in floats and not _is_amid(traced, node, floats)]:
        floats.difference_update(struck)
    return [node for node in joins if node in floats]


def _is_join(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is INT8 work without weights."""
    is_layer = isinstance(module_of(traced, node), nn.Conv2d | nn.Linear)
    return kind_of(traced, node) == "int8" and is_float_tensor(node) and not is_layer


def _is_amid(traced: fx.GraphModule, node: fx.Node, floats: set[fx.Node]) -> bool:
    """Whether a node reads a value of float work, and is read by float work alone."""
    sources = [source for source in node.all_input_nodes if is_float_tensor(source)]
    readers = _readers(traced, node, ("same", "move", "rectifier"))
    return any(_is_float_work(traced, source, floats) for source in sources) and all(
        kind_of(traced, reader) == "float" or reader in floats for reader in readers
    )


def _is_float_work(traced: fx.GraphModule, node: fx.Node, floats: Collection[fx.Node] = ()) -> bool:
    """Whether float work, or a node of `floats`, gave the value of `node`, before any moves and rectifiers."""
    source = origin(traced, node, through=("same", "move", "rectifier"))
    return kind_of(traced, source) == "float" or source in floats


def _wants_rounding(traced: fx.GraphModule, node: fx.Node) -> bool:
    kind = kind_of(traced, node)
    if kind in ("same", "move") or not is_float_tensor(node):
        return False
    nearest = _readers(traced, node, ("same",))
    if kind == "int8" and len(nearest) == 1 and kind_of(traced, nearest[0]) == "rectifier":
        return False  # the rectifier's output is rounded instead
    # The integer kernels of convolutions and joins write integers alone; that of linear layers can write float.
    if kind == "rectifier" or (kind == "int8" and not isinstance(module_of(traced, node), nn.Linear)):
        return True
    readers = _readers(traced, node, ("same", "move"))
    return any(kind_of(traced, reader) in ("int8", "rectifier") for reader in readers)


def _readers(traced: fx.GraphModule, node: fx.Node, through: tuple[Kind, ...]) -> list[fx.Node]:
    """The nodes that read `node`'s values, looking through nodes of the given kinds."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(traced, user, through) if kind_of(traced, user) in through else [user]
    return found
