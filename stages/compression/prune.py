"""Structured pruning: whole channels go, together with everything that reads or writes them.

A dependency graph says which layers share their channels (DepGraph, Fang et al. 2023, arXiv:2301.12900, through
torch-pruning): all that meet in a residual sum, a depthwise convolution and what feeds it, a convolution and its batch
norm. Such a group is pruned as one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch_pruning
from pydantic import Field
from torch import Tensor, nn

from stages.cause import cause
from stages.compression.bare_copy import bare_copy
from stages.compression.widths import has_sizes, record_widths
from stages.config import section
from stages.errors import ModelError
from stages.models.module_path import module_named

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@section
class PruneConfig:
    """How many channels go, and which.

    ratio: the share of the prunable channels that is removed.
    importance: "l1" is the mean L1 norm of the weights that read or write a channel, over its group; the least go.
    scope: "layer" takes the same share of every group; "global" takes the least important channels wherever they are,
        each group's importance divided by its mean.
    max_ratio: the most that "global" may take of one group.
    round_to: what is left is the nearest multiple of this, so that layers stay on onnxruntime's fast kernels, where 29
        channels cost half as much again as 32.
    keep: module paths, layers or whole blocks, all of whose output channels stay.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    importance: Literal["l1"] = "l1"
    scope: Literal["global", "layer"] = "layer"
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    round_to: Annotated[int, Field(ge=1)] = 8
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand and fall together across layers, found from one of the layers that write them.

    importance: [num_channels / num_lanes]. A grouped convolution or group norm splits the channels into lanes of equal
    length, which all lose the same ones.
    """

    path: str
    layer: nn.Module
    prune_outputs: Any
    importance: Tensor
    num_lanes: int


def prune(model: nn.Module, example: Tensor, config: PruneConfig) -> nn.Module:
    """A pruned copy of `model`; `model` stays as it is. Only the shape of `example` [B, C, H, W] counts.

    Module paths, input channels and logits stay; `record_widths` tells what is left. Raises ModelError if a path in
    `keep` is unknown, a layer would be left without channels, nothing can be removed, or the pruned model does not run,
    as happens where a forward has channel numbers written in.
    """
    pruned = bare_copy(model)
    example = example.to(next(model.parameters(), example).device)
    kept = [module_named(pruned, path) for path in config.keep]
    with _traceable(pruned):
        graph = _dependency_graph(pruned, example)
        groups = _groups(graph, pruned, [*_output_layers(graph), *kept])
        for group, num_kept in zip(groups, _widths_left(groups, config), strict=True):
            _remove(graph, group, num_kept)
    if record_widths(pruned) == record_widths(model):
        raise ModelError(
            f"pruning {config.ratio:.0%} with prune.round_to {config.round_to} and prune.keep {list(config.keep)} "
            "removes no channel of this model: lower round_to, or keep less."
        )
    _require_it_runs(pruned, example)
    return pruned


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients for every parameter, as tracing by autograd needs them; undone at the end."""
    modes = {module: module.training for module in model.modules()}
    learning = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    model.eval().requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning tells of parameters outside layers; they are left alone
        try:
            yield
        except ModelError:
            raise
        except Exception as fault:
            raise ModelError(
                f"this model cannot be pruned: torch-pruning cannot follow its channels ({cause(fault)}), as "
                "where they are shuffled or reshaped; set compress.steps = ['quantize']."
            ) from fault
    for module, training in modes.items():
        module.training = training
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(learning[path])


def _dependency_graph(model: nn.Module, example: Tensor) -> torch_pruning.DependencyGraph:
    try:
        model(example)
    except Exception as fault:
        raise ModelError(
            f"the model does not run on an input of shape {list(example.shape)}: {cause(fault)}"
        ) from fault
    # In a list: a bare tensor would be spread over its first axis, and images offered one by one.
    return torch_pruning.DependencyGraph().build_dependency(model, [example], verbose=False)


def _output_layers(graph: torch_pruning.DependencyGraph) -> list[nn.Module]:
    """The layers that write the logits: the first ones met on the way back from the output."""
    found: list[nn.Module] = []
    seen: set[Any] = set()
    ahead = [next(iter(graph.module2node.values()))]  # tracing starts at the output
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, WEIGHT_LAYERS):
            found.append(node.module)
        else:
            ahead += node.inputs
    return found


def _groups(graph: torch_pruning.DependencyGraph, model: nn.Module, kept: Sequence[nn.Module]) -> list[ChannelGroup]:
    """The groups of channels that may be pruned, with their importance.

    Left alone are groups that a layer in `kept` writes, and those that reach a parameter or layer whose size no record
    of widths holds (attention, positional embeddings).
    """
    untouchable = [layer for module in kept for layer in module.modules()]
    paths = {module: path for path, module in model.named_modules()}
    measure = torch_pruning.importance.GroupMagnitudeImportance(p=1, normalizer=None)
    groups = []
    for found in graph.get_all_groups(ignored_layers=untouchable, root_module_types=WEIGHT_LAYERS):
        members = [dependency.target.module for dependency, _ in found]
        if not all(has_sizes(member) or _is_weightless(member) for member in members):
            continue
        num_lanes = math.lcm(*(_num_lanes(member) for member in members))
        importance = measure(found).detach().cpu().double().view(num_lanes, -1).mean(dim=0)
        root = found[0].dep
        groups.append(ChannelGroup(paths[root.target.module], root.target.module, root.handler, importance, num_lanes))
    return groups


def _is_weightless(member: Any) -> bool:
    return isinstance(member, nn.Module) and next(member.parameters(), None) is None


def _num_lanes(member: Any) -> int:
    if isinstance(member, nn.GroupNorm):
        return member.num_groups
    if isinstance(member, nn.Conv1d | nn.Conv2d | nn.Conv3d) and member.groups != member.out_channels:
        return member.groups
    return 1


def _widths_left(groups: Sequence[ChannelGroup], config: PruneConfig) -> list[int]:
    """How many channels of each lane stay, group by group."""
    widths = [len(group.importance) for group in groups]
    left: Sequence[float] = [width * (1 - config.ratio) for width in widths]
    if config.scope == "global":
        left = _left_by_rank(groups, config)
    for group, width, num_kept in zip(groups, widths, left, strict=True):
        if num_kept < 0.5:
            raise ModelError(
                f"pruning {config.ratio:.0%} would leave {group.path!r} ({width * group.num_lanes} channels) without "
                "a channel: lower prune.ratio, or name the module in prune.keep."
            )
    return [
        _nearest_multiple(num_kept, max(1, config.round_to // group.num_lanes), width)
        for group, width, num_kept in zip(groups, widths, left, strict=True)
    ]


def _left_by_rank(groups: Sequence[ChannelGroup], config: PruneConfig) -> list[int]:
    """How many channels of each group stay when the least important of all go, and none loses more than max_ratio."""
    scores = []
    for group in groups:
        score = group.importance / group.importance.mean().clamp(min=torch.finfo(torch.float64).tiny)
        num_safe = math.ceil(len(score) * (1 - config.max_ratio))
        score[score.argsort(descending=True, stable=True)[:num_safe]] = torch.inf
        scores.append(score)
    ranked = torch.cat(scores) if scores else torch.zeros(0)
    num_removed = round(len(ranked) * config.ratio)
    if num_removed > int(ranked.isfinite().sum()):
        raise ModelError(
            f"pruning {config.ratio:.0%} of all channels is impossible while prune.max_ratio lets no layer lose more "
            f"than {config.max_ratio:.0%}: lower prune.ratio, or raise prune.max_ratio."
        )
    gone = torch.zeros(len(ranked), dtype=torch.bool)
    gone[ranked.argsort(stable=True)[:num_removed]] = True
    return [int((~part).sum()) for part in torch.split(gone, [len(score) for score in scores])]


def _nearest_multiple(num_kept: float, step: int, width: int) -> int:
    return min(width, max(step, step * math.floor(num_kept / step + 0.5)))


def _remove(graph: torch_pruning.DependencyGraph, group: ChannelGroup, num_kept: int) -> None:
    """Cut all but the `num_kept` most important channels of each lane out of every layer of the group."""
    width = len(group.importance)
    least = group.importance.argsort(stable=True)[: width - num_kept].tolist()
    channels = [lane * width + index for lane in range(group.num_lanes) for index in least]
    if channels:
        graph.get_pruning_group(group.layer, group.prune_outputs, channels).prune()


def _require_it_runs(pruned: nn.Module, example: Tensor) -> None:
    try:
        with torch.no_grad():
            bare_copy(pruned).eval()(example)
    except Exception as fault:
        raise ModelError(
            f"the pruned model does not run ({cause(fault)}): where its forward has channel numbers written in, "
            "name the module in prune.keep."
        ) from fault
