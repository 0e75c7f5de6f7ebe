"""Which channels stand and fall together, which of them may go, and why the others may not.

A dependency graph says which layers share their channels (DepGraph, Fang et al. 2023, arXiv:2301.12900, through
torch-pruning): all that meet in a residual sum, a depthwise convolution and what feeds it, a convolution and its batch
norm. Such a group is pruned as one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.cause import cause
from stages.compression.bare_copy import bare_copy
from stages.compression.importance import batch_norms_of, mean_over_lanes
from stages.compression.widths import SIZES, has_sizes
from stages.errors import ModelError

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

NO_END = 16
"""Following channels is given up where they become this many times those of the widest layer, as in Swin's windows."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand and fall together across layers, found from one of the layers that write them.

    importance: [num_channels / num_lanes]. A grouped convolution or group norm splits the channels into lanes of equal
    length, which all lose the same ones.
    full_width: the channels of a lane in the unpruned network.
    cuts: (module path, size, by how much it shrinks if all channels went), as `record_widths` names the sizes.
    """

    path: str
    layer: nn.Module
    prune_outputs: Any
    importance: Tensor
    num_lanes: int
    full_width: int
    cuts: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Channels:
    """A network's groups, the graph that they were found in, and the layers all of whose outputs stay, with why."""

    graph: torch_pruning.DependencyGraph
    groups: Sequence[ChannelGroup]
    spared: Mapping[str, str]


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients for every parameter, as tracing by autograd needs them; undone at the end."""
    modes = {module: module.training for module in model.modules()}
    learning = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    model.eval().requires_grad_(True)
    yield
    for module, training in modes.items():
        module.training = training
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(learning[path])


def output_layers(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The layers that write the logits: the first ones met on the way back from the output; `model` is `traceable`.

    Raises ModelError if the model does not run on `example`.
    """
    layer_of: dict[Any, nn.Module] = {}

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        layer_of[output.grad_fn] = layer

    hooks = [layer.register_forward_hook(remember) for layer in model.modules() if isinstance(layer, WEIGHT_LAYERS)]
    try:
        with torch.enable_grad():
            ahead = [model(example).grad_fn]
    except Exception as fault:
        raise ModelError(
            f"the model does not run on an input of shape {list(example.shape)}: {cause(fault)}"
        ) from fault
    finally:
        for hook in hooks:
            hook.remove()
    found, seen = [], set()
    while ahead:
        node = ahead.pop()
        if node in layer_of:
            found.append(layer_of[node])
        elif node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found


def find_channels(
    model: nn.Module,
    example: Tensor,
    kept: Sequence[nn.Module],
    measure: Callable[[Any], Tensor],
    *,
    full_widths: Mapping[str, Any],
    with_batch_norm: bool,
) -> Channels:
    """The groups of channels that may be pruned, with their importance by `measure`; `model` is `traceable`.

    Spared are groups that the logits or a layer in `kept` are among, those that reach a parameter or layer whose size
    no record of widths holds (attention, positional embeddings), and, for `with_batch_norm`, those without one.
    """
    outputs = output_layers(model, example)
    groups = []
    spared: dict[nn.Module, str] = {}
    with following(model, example):
        # In a list: a bare tensor would be spread over its first axis, and images offered one by one.
        graph = torch_pruning.DependencyGraph().build_dependency(model, [example], verbose=False)
        names = _Names(model, outputs, kept)
        for found in _all_groups(graph):
            reason = _why_spared(found, names, with_batch_norm=with_batch_norm)
            if reason is None:
                groups.append(_group(found, names, measure, full_widths))
            else:
                spared |= {layer: names.why(layer) or reason for layer in _written(found, WEIGHT_LAYERS)}
        spared |= {layer: names.why_outside(layer) for layer in names.layers_outside(graph)}
    in_order = {path: spared[module] for module, path in names.paths.items() if module in spared}
    return Channels(graph, groups, in_order)


def remove(channels: Channels, left: Sequence[int]) -> None:
    """Cut all but the `left` most important channels of each lane out of every layer of each group."""
    for group, num_kept in zip(channels.groups, left, strict=True):
        width = len(group.importance)
        least = group.importance.argsort(stable=True)[: width - num_kept].tolist()
        gone = [lane * width + index for lane in range(group.num_lanes) for index in least]
        if gone:
            channels.graph.get_pruning_group(group.layer, group.prune_outputs, gone).prune()


def widths_after(widths: Mapping[str, Any], groups: Sequence[ChannelGroup], left: Sequence[int]) -> dict[str, Any]:
    """What `record_widths` tells after `remove`, from what it tells before."""
    after = {path: dict(sizes) for path, sizes in widths.items()}
    for group, num_kept in zip(groups, left, strict=True):
        width = len(group.importance)
        for path, size, share in group.cuts:
            less = share * (width - num_kept) // width
            held = after[path][size]
            after[path][size] = [*held[:-1], held[-1] - less] if isinstance(held, list) else held - less
    return after


@contextmanager
def following(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Where torch-pruning fails at what is done inside, a ModelError says so, and where the channels get lost."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning tells of parameters outside layers; they are left alone
        try:
            yield
        except ModelError:
            raise
        except Exception as fault:
            where = _reshaping_module(model, example)
            raise ModelError(
                f"this model cannot be pruned: torch-pruning cannot follow its channels ({cause(fault)}), as "
                f"where they are shuffled or reshaped{f', here in {where}' if where else ''}; "
                "set compress.steps = ['quantize'], or prune.kind = 'weights'."
            ) from fault


@contextmanager
def entered(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running, the innermost last: after a fault, where it happened."""
    running: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        name = f"{path!r} ({type(module).__name__})" if path else f"the model's own forward ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


class _Reshapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which module a map [B, C, H, W] was first given more axes, or shuffled."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = running
        self.first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_map = bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 4
        more = isinstance(out, Tensor) and out.dim() > 4
        if self.first is None and self.running and is_map and (more or "shuffle" in str(func)):
            self.first = self.running[-1]
        return out


def _reshaping_module(model: nn.Module, example: Tensor) -> str | None:
    copy = bare_copy(model).eval()
    try:
        with torch.no_grad(), entered(copy) as running, _Reshapes(running) as reshapes:
            copy(example)
    except Exception:
        return None  # half pruned, it may not run any more
    first: str | None = reshapes.first
    return first


class _Bounded(list[Any]):
    """A link's index mappings, and behind them one that refuses more than `most` indices and else passes them on."""

    def __init__(self, mappings: Sequence[Any], most: int) -> None:
        super().__init__(mappings)
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield self._checked

    def _checked(self, indices: Sequence[Any]) -> Sequence[Any]:
        if len(indices) > self.most:
            raise RuntimeError("following them comes to no end")
        return indices


def _all_groups(graph: torch_pruning.DependencyGraph) -> Iterator[Any]:
    """Every group that a layer writes, once, with all its channels."""
    widest = max(
        (max(layer.weight.shape[:2]) for layer in graph.module2node if isinstance(layer, WEIGHT_LAYERS)), default=1
    )
    for node in graph.module2node.values():
        for link in node.dependencies:
            link.index_mapping = _Bounded(link.index_mapping, NO_END * widest)
    seen: set[int] = set()
    for layer in list(graph.module2node):
        if isinstance(layer, WEIGHT_LAYERS) and id(layer) not in seen:
            pruner = graph.get_pruner_of_module(layer)
            channels = list(range(pruner.get_out_channels(layer)))
            found = graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
            seen.update(id(one.target.module) for one, _ in found if graph.is_out_channel_pruning_fn(one.handler))
            yield found


class _Names:
    """What the modules and parameters of a model are called, and which of them must stay whole for their own sake."""

    def __init__(self, model: nn.Module, outputs: Sequence[nn.Module], kept: Sequence[nn.Module]) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.parameters = {id(parameter): path for path, parameter in model.named_parameters()}
        self.attentions = {
            inner: path
            for path, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for inner in module.modules()
        }
        self.own = {layer: "named in prune.keep" for module in kept for layer in module.modules()}
        self.own |= dict.fromkeys(outputs, "it writes the logits")

    def why(self, layer: Any) -> str | None:
        """Why a layer stays whole, if it is named or writes the logits."""
        return self.own.get(layer) if isinstance(layer, nn.Module) else None

    def layers_outside(self, graph: torch_pruning.DependencyGraph) -> list[nn.Module]:
        return [layer for layer in self.paths if isinstance(layer, WEIGHT_LAYERS) and layer not in graph.module2node]

    def why_outside(self, layer: nn.Module) -> str:
        inside = self.attentions.get(layer)
        return "the forward does not call it" if inside is None else f"it is part of the attention {inside!r}"

    def of(self, member: Any) -> str:
        """A member that no record of widths covers."""
        if isinstance(member, nn.Parameter):
            return f"the parameter {self.parameters.get(id(member), '')!r}"
        if isinstance(member, nn.MultiheadAttention):
            return f"the attention {self.paths[member]!r}"
        return f"{self.paths.get(member, '')!r} ({type(member).__name__}), which cannot be cut"


def _why_spared(found: Any, names: _Names, *, with_batch_norm: bool) -> str | None:
    """Why a group must stay whole; None if it need not."""
    members = [one.target.module for one, _ in found]
    for member in [*_written(found, WEIGHT_LAYERS), *_written(found, nn.Module)]:
        if (own := names.why(member)) is not None:
            return f"its channels meet those of {names.paths[member]!r}: {own}"
    for member in members:
        if not has_sizes(member) and not _is_weightless(member):
            return f"its channels reach {names.of(member)}"
    for member in _written(found, nn.Module):
        # What passes channels on and follows nothing sees the image.
        if _passes_on(member) and not found._DG.module2node[member].inputs:
            return f"its channels are the image's, which {names.paths[member]!r} reads one by one"
    if any(_is_shuffle(found._DG.module2node[member].grad_fn) for member in members):
        return "its channels are shuffled, or split over more axes and joined again"
    if with_batch_norm and not batch_norms_of(members):
        return "no batch norm in its group"
    return None


def _group(found: Any, names: _Names, measure: Callable[[Any], Tensor], full_widths: Mapping[str, Any]) -> ChannelGroup:
    num_lanes = math.lcm(*(_num_lanes(one.target.module) for one, _ in found))
    root = found[0].dep
    path = names.paths[root.target.module]
    full = full_widths[path]
    return ChannelGroup(
        path=path,
        layer=root.target.module,
        prune_outputs=root.handler,
        importance=mean_over_lanes(measure(found), num_lanes),
        num_lanes=num_lanes,
        full_width=full.get("out_channels", full.get("out_features")) // num_lanes,
        cuts=tuple(
            (names.paths[one.target.module], size, len(indices))
            for one, indices in found
            for size in _sizes_cut(found, one)
        ),
    )


def _written(found: Any, kinds: Any) -> list[Any]:
    """The members of these kinds whose outputs the group holds, not just their inputs."""
    members = [one.target.module for one, _ in found if found._DG.is_out_channel_pruning_fn(one.handler)]
    return [member for member in members if isinstance(member, kinds)]


def _sizes_cut(found: Any, dependency: Any) -> tuple[str, ...]:
    """The sizes that a member of a group loses channels of, by the names of a record of widths."""
    layer = dependency.target.module
    kind = next((kind for kind in SIZES if isinstance(layer, kind)), None)
    if kind is None or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
        return ()
    if _is_depthwise(layer):
        return SIZES[kind]
    if isinstance(layer, WEIGHT_LAYERS):
        return (SIZES[kind][1 if found._DG.is_out_channel_pruning_fn(dependency.handler) else 0],)
    return SIZES[kind][:1]


def _is_shuffle(operation: Any) -> bool:
    """Whether an operation of autograd's graph puts channels in another order, which torch-pruning takes to stay in
    place: a shuffle by name, or a view of five and more axes as a map [B, C, H, W]."""
    name = operation.name().lower() if hasattr(operation, "name") else ""
    return "shuffle" in name or ("view" in name and len(getattr(operation, "_saved_self_sym_sizes", ())) > 4)


def _is_weightless(member: Any) -> bool:
    return isinstance(member, nn.Module) and next(member.parameters(), None) is None


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == layer.out_channels > 1


def _passes_on(member: Any) -> bool:
    return _is_depthwise(member) or (has_sizes(member) and not isinstance(member, WEIGHT_LAYERS))


def _num_lanes(member: Any) -> int:
    if isinstance(member, nn.GroupNorm):
        return member.num_groups
    if isinstance(member, nn.Conv1d | nn.Conv2d | nn.Conv3d) and member.groups != member.out_channels:
        return member.groups
    return 1
