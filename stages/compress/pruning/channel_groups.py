"""Find groups of coupled channels and which can be pruned.

A dependency graph shows which layers share their channels (DepGraph, Fang et al. 2023, arXiv:2301.12900, through
torch-pruning): all that meet in a residual sum, a depthwise convolution and what feeds it, a convolution and its batch
norm. Such a group is pruned as one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.exclusions import (
    WEIGHT_LAYERS,
    ModuleNames,
    exclusion_reason,
    is_depthwise,
    written,
)
from kdpipe.stages.compress.pruning.heads import Heads, why_whole
from kdpipe.stages.compress.pruning.importance import import_torch_pruning
from kdpipe.stages.compress.pruning.widths import CHANNELS, SIZES, has_sizes
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.hooks import capture, model_errors, nearest

if TYPE_CHECKING:
    import torch_pruning

MAX_GROWTH = 16
"""Tracing stops if a group has this many times the channels of the widest layer, as in Swin's windows."""


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels of several layers, found from one of the layers that write them.

    A grouped convolution or group norm splits the channels into lanes of equal length, which all lose the same ones;
    so do the queries, keys and values of one layer. Of an attention each "channel" is a head of `block` of them.

    Attributes:
        path, layer: One of those layers.
        prune_outputs: torch-pruning's function that removes its output channels.
        importance: [num_channels / num_lanes / block].
        full_width: The channels of a lane in the unpruned network; or its heads.
        cuts: (module path, size, its decrease if all channels were removed), as `record_widths` names the sizes.
        heads: The attention whose heads these are.
    """

    path: str
    layer: nn.Module
    prune_outputs: Any
    importance: Tensor
    num_lanes: int
    full_width: int
    cuts: tuple[tuple[str, str, int], ...]
    heads: Heads | None = None

    @property
    def block(self) -> int:
        return self.heads.head_dim if self.heads else 1


@dataclass(frozen=True)
class Channels:
    """A network's prunable groups, their graph, and the layers all of whose outputs stay, with the reason."""

    graph: torch_pruning.DependencyGraph
    groups: Sequence[ChannelGroup]
    excluded: Mapping[str, str]


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Set eval mode and gradients for every parameter, as tracing by autograd needs; restore both at the end."""
    requires_grad = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    with preserve_modes(model):
        model.eval().requires_grad_(True)
        yield
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad[path])


@contextmanager
def follow_channels() -> Iterator[None]:
    """Convert failures of torch-pruning to a ModelError."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside layers, which stay unpruned
        try:
            yield
        except Exception as error:
            raise ModelError(
                f"this model cannot be pruned: torch-pruning cannot follow its channels ({cause(error)}), which are "
                "shuffled or reshaped; set prune.kind = 'blocks', 'low-rank' or 'weights', or compress.steps = "
                "['quantize']."
            ) from error


def output_layers(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """Return the layers that write the logits of a `traceable` model: the first ones on the way back from the output.

    Raises:
        ModelError: If the model does not run on `example` [B, C, H, W].
    """
    layers = [layer for layer in model.modules() if isinstance(layer, WEIGHT_LAYERS)]
    with model_errors(example), torch.enable_grad(), capture(layers, lambda output: output.grad_fn) as operations:
        logits = model(example).grad_fn
    layer_of = {operation: layer for layer, calls in operations.items() for operation in calls}
    return nearest(logits, layer_of)


def find_channels(
    model: nn.Module,
    example: Tensor,
    exclude: Sequence[nn.Module],
    measure: Callable[[Any], Tensor],
    *,
    full_widths: Mapping[str, Any],
    with_batch_norm: bool,
    heads: bool = False,
) -> Channels:
    """Find the groups of channels of a `traceable` model that can be pruned, with their importance by `measure`.

    Excluded are groups that contain the logits or a layer in `exclude`, those that reach a parameter or layer whose
    size is not in the record of widths (attention, positional embeddings), and, for `with_batch_norm`, those without
    one. `full_widths` are those of the unpruned network. With `heads`, attentions of timm and transformers lose whole
    heads where that can be done.
    """
    outputs = output_layers(model, example)
    groups = []
    excluded: dict[nn.Module, str] = {}
    tried: dict[type, str | None] = {}
    with follow_channels():
        # In a list: a bare tensor would be unpacked along its first axis.
        graph = import_torch_pruning().DependencyGraph().build_dependency(model, [example], verbose=False)
        names = ModuleNames(model, outputs, exclude, heads=heads)
        names.unseen = _unseen(model, example, graph)
        for found in _all_groups(graph):
            reason = exclusion_reason(found, names, with_batch_norm=with_batch_norm)
            if reason is None and (own := _heads_of(found, names)):
                kind = type(own.attention)
                if kind not in tried:
                    tried[kind] = why_whole(_first_head(found, own), own, model, example)
                reason = tried[kind] and f"it is part of the attention {names.paths[own.attention]!r}: {tried[kind]}"
            if reason is None:
                try:
                    groups.append(_group(found, names, measure, full_widths))
                except IndexError as error:
                    reason = f"torch-pruning cannot follow its channels ({cause(error)})"
            if reason is not None:
                excluded |= {layer: names.reasons.get(layer, reason) for layer in written(found, WEIGHT_LAYERS)}
        excluded |= names.outside(graph)
    in_order = {path: excluded[module] for module, path in names.paths.items() if module in excluded}
    return Channels(graph, groups, in_order)


def _unseen(model: nn.Module, example: Tensor, graph: torch_pruning.DependencyGraph) -> list[nn.Module]:
    """Return the layers that a forward pass calls without use for the logits, as SigLIP's pooling is."""
    layers = [layer for layer in model.modules() if has_sizes(layer) or isinstance(layer, nn.MultiheadAttention)]
    with capture(layers, lambda output: None) as calls:
        model(example)
    return [layer for layer, called in calls.items() if called and layer not in graph.module2node]


def remove(channels: Channels, kept: Sequence[int]) -> dict[nn.Module, list[int]]:
    """Remove all but the `kept` most important channels of each lane from every layer of each group.

    Returns the removed output channels of each module that lost some.
    """
    removed_of: dict[nn.Module, list[int]] = {}
    for group, num_kept in zip(channels.groups, kept, strict=True):
        width, block = len(group.importance), group.block
        lowest = group.importance.argsort(stable=True)[: width - num_kept].tolist()
        removed = [
            (lane * width + index) * block + channel
            for lane in range(group.num_lanes)
            for index in lowest
            for channel in range(block)
        ]
        if removed:
            found = channels.graph.get_pruning_group(group.layer, group.prune_outputs, removed)
            for member, indices in found:
                if channels.graph.is_out_channel_pruning_fn(member.handler):
                    removed_of[member.target.module] = list(indices)
            found.prune()
            if group.heads:
                group.heads.fit()
    return removed_of


def widths_after(widths: Mapping[str, Any], groups: Sequence[ChannelGroup], kept: Sequence[int]) -> dict[str, Any]:
    """Return the `record_widths` of the network after `remove`, given that before."""
    after = {path: dict(sizes) for path, sizes in widths.items()}
    for group, num_kept in zip(groups, kept, strict=True):
        width = len(group.importance)
        for path, size, share in group.cuts:
            less = share * (width - num_kept) // width
            before = after[path][size]
            after[path][size] = [*before[:-1], before[-1] - less] if isinstance(before, list) else before - less
    return after


class _BoundedMappings(list[Any]):
    """A link's index mappings, followed by a check that there are at most `limit` indices."""

    def __init__(self, mappings: Sequence[Any], limit: int) -> None:
        super().__init__(mappings)
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield self._checked

    def _checked(self, indices: Sequence[Any]) -> Sequence[Any]:
        if len(indices) > self.limit:
            raise RuntimeError("their number keeps growing")
        return indices


def _all_groups(graph: torch_pruning.DependencyGraph) -> Iterator[Any]:
    """Yield every group that a layer writes, once, with all its channels."""
    widest = max(
        (max(layer.weight.shape[:2]) for layer in graph.module2node if isinstance(layer, WEIGHT_LAYERS)), default=1
    )
    for node in graph.module2node.values():
        for link in node.dependencies:
            link.index_mapping = _BoundedMappings(link.index_mapping, MAX_GROWTH * widest)
    visited: set[int] = set()
    for layer in list(graph.module2node):
        if isinstance(layer, WEIGHT_LAYERS) and id(layer) not in visited:
            pruner = graph.get_pruner_of_module(layer)
            channels = list(range(pruner.get_out_channels(layer)))
            found = graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
            visited.update(
                id(member.target.module) for member, _ in found if graph.is_out_channel_pruning_fn(member.handler)
            )
            yield found


def _group(
    found: Any, names: ModuleNames, measure: Callable[[Any], Tensor], full_widths: Mapping[str, Any]
) -> ChannelGroup:
    root, heads = found[0].dep, _heads_of(found, names)
    num_lanes = math.lcm(*(_num_lanes(member.target.module) for member, _ in found))
    if heads:
        num_lanes = heads.projections[root.target.module]
    block = heads.head_dim if heads else 1
    path = names.paths[root.target.module]
    full = full_widths[path]
    return ChannelGroup(
        path=path,
        layer=root.target.module,
        prune_outputs=root.handler,
        importance=measure(found).view(num_lanes, -1, block).mean(dim=0).mean(dim=1),  # lanes lose the same channels
        num_lanes=num_lanes,
        full_width=full.get("out_channels", full.get("out_features")) // num_lanes // block,
        cuts=tuple(
            (names.path_of(member.target.module), size, len(indices))
            for member, indices in found
            for size in _sizes_cut(found, member)
        ),
        heads=heads,
    )


def _heads_of(found: Any, names: ModuleNames) -> Heads | None:
    """Return the attention whose queries, keys or values a group is found from."""
    return names.heads.get(found[0].dep.target.module)


def _first_head(found: Any, heads: Heads) -> Any:
    """Return the group of the first head."""
    root = found[0].dep
    num_lanes = heads.projections[root.target.module]
    lane = root.target.module.out_features // num_lanes
    first = [number * lane + channel for number in range(num_lanes) for channel in range(heads.head_dim)]
    return found._DG.get_pruning_group(root.target.module, root.handler, first)


def _sizes_cut(found: Any, dependency: Any) -> tuple[str, ...]:
    """Return the sizes of a group member that lose channels, by their names in a record of widths."""
    layer = dependency.target.module
    if isinstance(layer, nn.Parameter | nn.Embedding):
        return (CHANNELS,)
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
