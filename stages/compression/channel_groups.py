"""Which channels stand and fall together, and which of them may go.

A dependency graph says which layers share their channels (DepGraph, Fang et al. 2023, arXiv:2301.12900, through
torch-pruning): all that meet in a residual sum, a depthwise convolution and what feeds it, a convolution and its batch
norm. Such a group is pruned as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from stages.compression.importance import mean_over_lanes
from stages.compression.lost_channels import following
from stages.compression.spared import WEIGHT_LAYERS, Names, is_depthwise, why_spared, written
from stages.compression.widths import SIZES
from stages.errors import ModelError, cause

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
        names = Names(model, outputs, kept)
        for found in _all_groups(graph):
            reason = why_spared(found, names, with_batch_norm=with_batch_norm)
            if reason is None:
                groups.append(_group(found, names, measure, full_widths))
            else:
                spared |= {layer: names.why(layer) or reason for layer in written(found, WEIGHT_LAYERS)}
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


def _group(found: Any, names: Names, measure: Callable[[Any], Tensor], full_widths: Mapping[str, Any]) -> ChannelGroup:
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


def _sizes_cut(found: Any, dependency: Any) -> tuple[str, ...]:
    """The sizes that a member of a group loses channels of, by the names of a record of widths."""
    layer = dependency.target.module
    kind = next((kind for kind in SIZES if isinstance(layer, kind)), None)
    if kind is None or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
        return ()
    if is_depthwise(layer):
        return SIZES[kind]
    if isinstance(layer, WEIGHT_LAYERS):
        return (SIZES[kind][1 if found._DG.is_out_channel_pruning_fn(dependency.handler) else 0],)
    return SIZES[kind][:1]


def _num_lanes(member: Any) -> int:
    if isinstance(member, nn.GroupNorm):
        return member.num_groups
    if isinstance(member, nn.Conv1d | nn.Conv2d | nn.Conv3d) and member.groups != member.out_channels:
        return member.groups
    return 1
