"""Structured and unstructured pruning.

Structured pruning removes whole channels, together with everything that reads or writes them (`channel_groups`), or
whole blocks (`depth`), or factors layers (`ranks`, `low_rank`); pruning of single weights zeroes them and keeps the
shape (`sparsity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.blocks import skipped_paths
from kdpipe.stages.compress.pruning.budget import MAX_LATENCIES, Allocation, Goal, Unreachable, Widths, find_ratio
from kdpipe.stages.compress.pruning.channel_groups import (
    ChannelGroup,
    Channels,
    find_channels,
    follow_channels,
    output_layers,
    remove,
    traceable,
    widths_after,
)
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Depth, Ranker, prune_blocks
from kdpipe.stages.compress.pruning.hard_coded import require_it_runs
from kdpipe.stages.compress.pruning.heads import projections
from kdpipe.stages.compress.pruning.importance import attach_gradients, detach_gradients, measure_of
from kdpipe.stages.compress.pruning.low_rank import ranks_of
from kdpipe.stages.compress.pruning.ranks import RankStep, lower_ranks
from kdpipe.stages.compress.pruning.sparsity import (
    masks_of,
    prunable_layers,
    prune_2_4,
    prune_smallest,
    require_own_weights,
)
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import get_module
from kdpipe.stages.models.main_logits import returns_more


@dataclass(frozen=True)
class Pruned:
    """A pruned network.

    Attributes:
        ratio: The share of the channels, or weights, asked of the groups to reach the goal, or of the blocks; with low
            ranks that of the parameters, or multiply-accumulates, that are gone. `prune` takes it.
        excluded: The path of every convolution and linear layer left whole, or block, in module order, with the reason.
        removed: The output channels that modules lost, by path.
        ranking: The blocks removed now, in order, each with the harm without it and those before it.
        ranks: The ranks lowered now, in order.
    """

    model: nn.Module
    ratio: float
    excluded: Mapping[str, str]
    removed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ranking: Sequence[tuple[str, float]] = ()
    ranks: Sequence[RankStep] = ()


def prune(
    model: nn.Module,
    example: Tensor,
    config: PruneConfig,
    *,
    full: nn.Module | None = None,
    done: float = 1.0,
    ratio: float | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    latency: Callable[[nn.Module], float] | None = None,
    ranker: Ranker | None = None,
) -> Pruned:
    """Return a pruned copy of `model`; module paths, input channels and logits stay.

    Removed blocks are replaced by `SkippedBlock`, and the modules inside them are gone; factored layers
    by `LowRank`.

    Args:
        model: The network; it stays unchanged.
        example: Images [B, C, H, W], of which only the shape counts.
        config: The settings, of one kind (`PruneConfig.parts`).
        full: The unpruned network that config.ratio refers to; `model` itself by default. After step k of n, `model`
            is the result of step k - 1 and `done` is k / n; config.ratio * done of `full` is then removed.
        done: The share of the goal to reach.
        ratio: The ratio found by an earlier search, which is then skipped; ranks are lowered until it is reached.
        gradients: Of the loss, by parameter name, in the parameters' shapes, for importance "taylor".
        latency: Returns a candidate's latency as a share of the full network's, for budget = "latency"; called at most
            seven times, with networks of different widths and meaningless weights.
        ranker: How blocks, or ranks, are chosen, for kind = "blocks" and "low-rank".

    Raises:
        ModelError: If a path in `exclude` is unknown, a layer would lose all channels, nothing can be removed, a goal
            cannot be reached, gradients or latencies are missing, or the pruned model does not run, as happens if a
            forward hard-codes channel numbers.
    """
    pruned = clone_without_hooks(model)
    example = example.to(next(model.parameters(), example).device)
    whole = model if full is None else full
    asked = config.ratio * done if ratio is None else ratio
    goal = None
    if ratio is None and config.budget not in {"channels", "blocks"}:
        goal = Goal(str(config.budget), 1 - asked, whole, example, latency)
    if config.is_ranked and ranker is None:
        raise ModelError(f'prune.kind = "{config.kind}" needs the `ranker` argument of prune().')
    if config.removes_blocks and ranker:
        depth = Depth(asked, goal, config.max_ratio, config.exclude, ranker)
        share, ranking, stays = prune_blocks(pruned, whole, example, depth)
        if done >= 1 and not skipped_paths(pruned):
            raise ModelError(f"pruning {config.ratio:.0%} removes no block of this model: raise compress.prune.ratio.")
        return Pruned(pruned, share, stays, ranking=ranking)
    if config.lowers_ranks and ranker:
        goal = goal or Goal("parameters" if config.budget == "parameters" else "macs", 1 - asked, whole, example, None)
        share, steps, stays = lower_ranks(pruned, whole, goal, config, ranker)
        if done >= 1 and not ranks_of(pruned):
            raise ModelError(f"pruning {config.ratio:.0%} factors no layer of this model: raise compress.prune.ratio.")
        return Pruned(pruned, share, stays, ranks=steps)
    excluded = [get_module(pruned, path) for path in config.exclude]
    if config.zeroes_weights:
        return _prune_weights(pruned, example, config, excluded, asked)
    require_own_weights(pruned)
    with traceable(pruned):
        channels = _channels(pruned, example, config, excluded, gradients=gradients, full_widths=record_widths(whole))
        allocation = Allocation(config.scope, config.max_ratio, config.round_to, keep_one=config.budget != "channels")
        ratio = asked if goal is None else _search(model, channels, allocation, goal, config)
        kept = allocation.num_kept(channels.groups, ratio)
        with follow_channels():
            removed = remove(channels, kept)
    detach_gradients(pruned)
    if done >= 1 and record_widths(pruned) == record_widths(whole):
        raise ModelError(_nothing_removed(config, channels.groups, ratio))
    if returns_more(pruned):
        _require_it_trains(pruned, example)
    require_it_runs(pruned, model, example, config.exclude, heads=config.heads)
    paths = {module: path for path, module in pruned.named_modules()}
    named = {paths[module]: indices for module, indices in removed.items() if module in paths}
    return Pruned(pruned, ratio, channels.excluded, named)


def _channels(
    pruned: nn.Module,
    example: Tensor,
    config: PruneConfig,
    excluded: Sequence[nn.Module],
    *,
    gradients: Mapping[str, Tensor] | None,
    full_widths: Mapping[str, object],
) -> Channels:
    """Find the groups of channels and measure their importance. Raises ModelError if there are none."""
    if config.importance == "taylor":
        attach_gradients(pruned, gradients)
    with_batch_norm = config.importance == "bn_scale"
    measure = measure_of(config.importance)
    channels = find_channels(
        pruned,
        example,
        excluded,
        measure,
        full_widths=full_widths,
        with_batch_norm=with_batch_norm,
        heads=config.heads,
    )
    if config.heads and not any(group.heads for group in channels.groups):
        attentions = {layer for module in pruned.modules() for layer, _ in projections(module)}
        of_heads = {path: why for path, why in channels.excluded.items() if pruned.get_submodule(path) in attentions}
        reasons = _reasons(of_heads) or "it has none of timm or transformers"
        raise ModelError(f"compress.prune.heads: no attention of this model can lose heads ({reasons}): leave it out.")
    if not channels.groups:
        layers, _ = prunable_layers(pruned, output_layers(pruned, example), excluded, is_2_4=False)
        weights = "set compress.prune.kind = 'weights', or " if layers else ""
        raise ModelError(
            f"no layer of this model can lose channels ({_reasons(channels.excluded)}): {weights}take 'prune' out of "
            "compress.steps."
        )
    return channels


def _reasons(excluded: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in list(excluded.items())[:3])


def _nothing_removed(config: PruneConfig, groups: Sequence[ChannelGroup], ratio: float) -> str:
    """Return the message for a pruning that removed nothing, with a setting that removes something."""
    finer = Allocation(config.scope, config.max_ratio, 1, keep_one=config.budget != "channels")
    widths = [len(group.importance) for group in groups]
    helps = config.round_to > 1 and list(finer.num_kept(groups, ratio)) != widths
    return (
        f"pruning {config.ratio:.0%} with prune.round_to {config.round_to} and prune.exclude {list(config.exclude)} "
        f"removes no channel of this model, whose layers have up to {max(widths)}: "
        + ("set compress.prune.round_to = 1." if helps else "raise compress.prune.ratio, or exclude less.")
    )


def _search(model: nn.Module, channels: Channels, allocation: Allocation, goal: Goal, config: PruneConfig) -> float:
    """Find the channel ratio that reaches the goal."""
    model, share_of_model = goal.measure(model)
    widths, full_widths = record_widths(model), record_widths(goal.full)

    def share_of(kept: Widths) -> float:
        after = widths_after(widths, channels.groups, kept)
        if after == full_widths:
            return 1.0
        candidate = apply_widths(clone_without_hooks(model), after)
        if goal.budget == "latency":  # before it is exported
            require_it_runs(candidate, model, goal.example, config.exclude, heads=config.heads)
        return share_of_model(candidate)

    try:
        return find_ratio(
            lambda ratio: allocation.num_kept(channels.groups, ratio),
            share_of,
            goal.share,
            highest=allocation.highest_ratio(channels.groups),
            max_measured=MAX_LATENCIES if goal.budget == "latency" else None,
        )
    except Unreachable as end:
        raise ModelError(
            f"pruning cannot leave {goal.share:.1%} of this model's {goal.budget}: with prune.round_to "
            f"{allocation.round_to}, prune.max_ratio {allocation.max_ratio:g} and prune.exclude "
            f"{list(config.exclude)}, {end.share:.1%} is the least; lower prune.ratio or round_to, raise "
            "max_ratio, or exclude less."
        ) from end


def _prune_weights(
    pruned: nn.Module, example: Tensor, config: PruneConfig, excluded: Sequence[nn.Module], ratio: float
) -> Pruned:
    with traceable(pruned):
        outputs = output_layers(pruned, example)
    layers, reasons = prunable_layers(pruned, outputs, excluded, is_2_4=config.kind == "2:4")
    if not layers:
        raise ModelError(
            f"no layer of this model can lose weights ({_reasons(reasons)}): take 'prune' out of compress.steps."
        )
    if config.kind == "2:4":
        prune_2_4(layers)
    else:
        prune_smallest(layers, ratio, together=config.scope == "global", max_share=config.max_ratio)
    if not masks_of(pruned):
        raise ModelError(f"pruning {ratio:.0%} zeroes no weight of this model: raise prune.ratio.")
    return Pruned(pruned, ratio, reasons)


def _require_it_trains(pruned: nn.Module, example: Tensor) -> None:
    """Raise ModelError if a head that runs in training only reads channels that were pruned."""
    copy = clone_without_hooks(pruned).train()
    try:
        with torch.no_grad():
            copy(example.expand(2, *example.shape[1:]))
    except Exception as error:
        raise ModelError(
            f"the pruned model does not run in training ({cause(error)}), where it returns more than logits: leave out "
            "the further heads (torchvision: args.aux_logits = false)."
        ) from error
