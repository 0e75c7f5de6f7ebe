"""Pruning, structured and not: what goes, how much of it, and the smaller network.

Structured pruning takes whole channels, together with everything that reads or writes them (`channel_groups`); pruning
of single weights zeroes them and leaves the shape (`sparsity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.compression.bare_copy import bare_copy
from stages.compression.channel_groups import (
    Channels,
    find_channels,
    output_layers,
    remove,
    traceable,
    widths_after,
)
from stages.compression.complexity import count_macs
from stages.compression.importance import lay_gradients, measure_of, take_gradients_away
from stages.compression.lost_channels import entered, following
from stages.compression.prune_target import MAX_LATENCIES, Shares, Unreachable, Widths, find_ratio
from stages.compression.sparsity import masks_of, sparable_layers, zero_smallest, zero_two_of_four
from stages.compression.widths import apply_widths, record_widths
from stages.config import Count, section
from stages.errors import ModelError, cause
from stages.models.module_path import module_named
from stages.models.weights import count_parameters


@section
class PruneConfig:
    """How much goes, and what.

    kind: "channels" removes them and makes the layers narrower; "weights" zeroes single weights of convolutions and
        linear layers; "2:4" zeroes two in every four of them along the input channels.
    ratio: the share that is removed of what `of` counts in the unpruned student; of the weights, for the other kinds.
    of: "channels" takes `ratio` of the prunable channels. "parameters", "macs" and "latency" take as few channels as
        leave at most 1 - ratio of the whole network's.
    importance: "l1" is the mean L1 norm of the weights that read or write a channel, over its group; the least go.
        "l2" is their L2 norm, "taylor" the sum of |weight * gradient|, "bn_scale" the scale of the batch norms.
    importance_batches: batches over which the gradients of "taylor" are summed.
    scope: "layer" takes the same share of every group; "global" takes the least important channels wherever they are,
        each group's importance divided by its mean, or the smallest weights wherever they are.
    max_ratio: the most that "global" may take of one group or layer.
    round_to: what is left is the nearest multiple of this, so that layers stay on onnxruntime's fast kernels, where 29
        channels cost half as much again as 32.
    keep: module paths, layers or whole blocks, all of whose output channels, or weights, stay.
    steps: in so many equal steps, with epochs_per_step epochs of fine-tuning between them.
    """

    kind: Literal["channels", "weights", "2:4"] = "channels"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    of: Literal["channels", "parameters", "macs", "latency"] = "channels"
    importance: Literal["l1", "l2", "taylor", "bn_scale"] = "l1"
    importance_batches: Count = 8
    scope: Literal["global", "layer"] = "layer"
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    round_to: Annotated[int, Field(ge=1, le=2**20)] = 8
    keep: tuple[str, ...] = ()
    steps: Count = 1
    epochs_per_step: Count = 2

    def __post_init__(self) -> None:
        if self.kind == "channels":
            return
        if self.of != "channels":
            raise ValueError(f'of = "{self.of}" is for kind = "channels": zeroed weights make no network smaller')
        if self.importance not in {"l1", "l2"}:
            raise ValueError(f'importance = "{self.importance}" is for kind = "channels": weights go by magnitude')
        if self.kind == "2:4" and self.ratio != 0.5:
            raise ValueError('kind = "2:4" zeroes half of the weights, always: leave ratio at 0.5')
        if self.kind == "2:4" and self.steps > 1:
            raise ValueError('kind = "2:4" is done in one step: leave steps at 1')
        if self.kind == "2:4" and self.scope == "global":
            raise ValueError('kind = "2:4" takes two of every four in every layer: leave scope at "layer"')


@dataclass(frozen=True)
class Pruned:
    """What `prune` made.

    ratio: the share of the channels, or weights, that was asked of the groups to reach the goal; `prune` takes it.
    spared: the path of every convolution and linear layer that was left whole, in module order, and why in a clause.
    """

    model: nn.Module
    ratio: float
    spared: Mapping[str, str]


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
) -> Pruned:
    """A pruned copy of `model`; `model` stays as it is. Only the shape of `example` [B, C, H, W] counts.

    Module paths, input channels and logits stay; `record_widths` tells what is left of the channels.

    full: the unpruned network that config.ratio is a share of; `model` itself by default. After step k of n on the way,
        `model` is what step k - 1 made and `done` is k / n; config.ratio * done of `full` is gone then.
    ratio: the channel ratio that an earlier search found: it is used, and nothing is searched.
    gradients: of the loss, by parameter name, in the parameters' shapes, for importance "taylor".
    latency: takes a candidate and tells its latency's share of the full network's, for of = "latency"; called at most
        seven times, with networks of different widths whose weights mean nothing.

    Raises ModelError if a path in `keep` is unknown, a layer would be left without channels, nothing can be removed, a
    goal cannot be reached, gradients or a way to measure are missing, or the pruned model does not run, as happens
    where a forward has channel numbers written in.
    """
    pruned = bare_copy(model)
    example = example.to(next(model.parameters(), example).device)
    kept = [module_named(pruned, path) for path in config.keep]
    if config.kind != "channels":
        return _prune_weights(pruned, example, config, kept, config.ratio * done if ratio is None else ratio)
    whole = model if full is None else full
    with traceable(pruned):
        channels = _channels(pruned, example, config, kept, gradients=gradients, full_widths=record_widths(whole))
        shares = Shares(config.scope, config.max_ratio, config.round_to, spare_one=config.of != "channels")
        if ratio is None:
            ratio = config.ratio * done
            if config.of != "channels":
                ratio = _search(model, whole, channels, shares, _Goal(config, 1 - ratio, example, latency))
        left = shares.left(channels.groups, ratio)
        with following(model, example):
            remove(channels, left)
    take_gradients_away(pruned)
    if done >= 1:
        _require_it_shrank(pruned, whole, config)
    _require_it_runs(pruned, example)
    return Pruned(pruned, ratio, channels.spared)


@dataclass(frozen=True)
class _Goal:
    """At most `share` of what config.of counts in the full network."""

    config: PruneConfig
    share: float
    example: Tensor
    latency: Callable[[nn.Module], float] | None

    def sizer(self, full: nn.Module) -> Callable[[nn.Module], float]:
        """What tells a candidate's share of the full network."""
        if self.config.of == "latency":
            if self.latency is None:
                raise ModelError('prune.of = "latency" needs a way to measure it, and prune() was given none.')
            return self.latency
        size = count_parameters if self.config.of == "parameters" else self._macs
        whole = size(full)
        return lambda candidate: size(candidate) / whole

    def _macs(self, model: nn.Module) -> int:
        channels, height, width = self.example.shape[1:]
        return count_macs(model, (channels, height, width))


def _channels(
    pruned: nn.Module,
    example: Tensor,
    config: PruneConfig,
    kept: Sequence[nn.Module],
    *,
    gradients: Mapping[str, Tensor] | None,
    full_widths: Mapping[str, object],
) -> Channels:
    """The groups of channels, measured as `config` says; ModelError if there are none."""
    if config.importance == "taylor":
        lay_gradients(pruned, gradients)
    channels = find_channels(
        pruned,
        example,
        kept,
        measure_of(config.importance),
        full_widths=full_widths,
        with_batch_norm=config.importance == "bn_scale",
    )
    if not channels.groups:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(channels.spared.items())[:3])
        raise ModelError(f"no layer of this model can lose channels ({reasons}): set prune.kind = 'weights'.")
    return channels


def _search(model: nn.Module, full: nn.Module, channels: Channels, shares: Shares, goal: _Goal) -> float:
    """The channel ratio that reaches the goal."""
    model, share_of_model = _sizing(model, full, goal)
    widths, full_widths = record_widths(model), record_widths(full)

    def share_of(left: Widths) -> float:
        after = widths_after(widths, channels.groups, left)
        return 1.0 if after == full_widths else share_of_model(apply_widths(bare_copy(model), after))

    of = goal.config.of
    try:
        return find_ratio(
            lambda ratio: shares.left(channels.groups, ratio),
            share_of,
            goal.share,
            most=shares.most(channels.groups),
            max_measured=MAX_LATENCIES if of == "latency" else None,
        )
    except Unreachable as end:
        raise ModelError(
            f"pruning cannot leave {goal.share:.1%} of this model's {of}: with prune.round_to {shares.round_to}, "
            f"prune.max_ratio {shares.max_ratio:g} and prune.keep {list(goal.config.keep)}, "
            f"{end.share:.1%} is the least; lower prune.ratio or round_to, raise max_ratio, or keep less."
        ) from end


def _sizing(model: nn.Module, full: nn.Module, goal: _Goal) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """What candidates are cut from, and what tells a candidate's share: shapes are enough where nothing is timed."""
    if goal.config.of != "latency":
        try:
            return bare_copy(model).to("meta"), goal.sizer(bare_copy(full).to("meta"))
        except (ModelError, NotImplementedError):
            pass  # its forward asks for values
    return model, goal.sizer(full)


def _prune_weights(
    pruned: nn.Module, example: Tensor, config: PruneConfig, kept: Sequence[nn.Module], ratio: float
) -> Pruned:
    with traceable(pruned):
        outputs = output_layers(pruned, example)
    layers, spared = sparable_layers(pruned, outputs, kept, runs_of_4=config.kind == "2:4")
    if not layers:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(spared.items())[:3])
        raise ModelError(f"no layer of this model can lose weights ({reasons}).")
    if config.kind == "2:4":
        zero_two_of_four(layers)
    else:
        zero_smallest(layers, ratio, together=config.scope == "global", max_share=config.max_ratio)
    if not masks_of(pruned):
        raise ModelError(f"pruning {ratio:.0%} zeroes no weight of this model: raise prune.ratio.")
    return Pruned(pruned, ratio, spared)


def _require_it_shrank(pruned: nn.Module, full: nn.Module, config: PruneConfig) -> None:
    if record_widths(pruned) == record_widths(full):
        raise ModelError(
            f"pruning {config.ratio:.0%} with prune.round_to {config.round_to} and prune.keep {list(config.keep)} "
            "removes no channel of this model: lower round_to, or keep less."
        )


def _require_it_runs(pruned: nn.Module, example: Tensor) -> None:
    copy = bare_copy(pruned).eval()
    with torch.no_grad(), entered(copy) as running:
        try:
            copy(example)
        except Exception as fault:
            raise ModelError(
                f"the pruned model does not run ({cause(fault)}), in {running[-1] if running else 'its forward'}: "
                "where its forward has channel numbers written in, name the module in prune.keep."
            ) from fault
