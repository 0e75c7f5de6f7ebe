"""Decide how much is removed: of each group of channels for a share of them, and for a budget of the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.channel_groups import ChannelGroup
from kdpipe.stages.compress.pruning.importance import global_lowest
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.weights.state_dict import count_parameters

Widths = tuple[int, ...]

MAX_LATENCIES = 7
"""The maximum number of networks whose latency a search measures."""

RESOLUTION = 2.0**-16
"""Channel ratios closer than this count as equal."""


@dataclass(frozen=True)
class Allocation:
    """A distribution of a channel ratio over the groups; see PruneConfig.

    With `keep_one` every lane keeps at least one channel; otherwise losing all is an error.
    """

    scope: Literal["global", "layer"]
    max_ratio: float
    round_to: int
    keep_one: bool = False

    def num_kept(self, groups: Sequence[ChannelGroup], ratio: float) -> Widths:
        """Return how many channels of each lane stay, by group, when `ratio` of the unpruned ones is removed.

        Raises:
            ModelError: If a group would lose all channels, or `max_ratio` forbids the ratio.
        """
        kept: Sequence[float] = [group.full_width * (1 - ratio) for group in groups]
        if self.scope == "global":
            kept = self._num_kept_by_rank(groups, ratio)
        for group, num_kept in zip(groups, kept, strict=True):
            if num_kept < 0.5 and not self.keep_one and not group.heads:
                raise ModelError(
                    f"pruning {ratio:.0%} would leave {group.path!r} ({group.full_width * group.num_lanes} channels) "
                    "without a channel: lower prune.ratio, or add the module to prune.exclude."
                )
        return tuple(self._rounded(group, num_kept) for group, num_kept in zip(groups, kept, strict=True))

    def highest_ratio(self, groups: Sequence[ChannelGroup]) -> float:
        """Return the highest ratio that `num_kept` accepts with `keep_one`."""
        full = sum(group.full_width for group in groups)
        return 1 - sum(self._num_safe(group) for group in groups) / full if self.scope == "global" else 1.0

    def _rounded(self, group: ChannelGroup, num_kept: float) -> int:
        step = max(1, self.round_to // (group.num_lanes * group.block))
        rounded = max(step, step * math.floor(num_kept / step + 0.5))
        return min(len(group.importance), rounded)

    def _num_safe(self, group: ChannelGroup) -> int:
        safe = math.ceil(round(group.full_width * (1 - self.max_ratio), 6))  # 10 * (1 - 0.9) is slightly more than 1
        return max(1, safe) if self.keep_one else safe

    def _num_kept_by_rank(self, groups: Sequence[ChannelGroup], ratio: float) -> list[int]:
        """Return how many channels stay when the globally lowest go and no group loses more than max_ratio."""
        tiny = torch.finfo(torch.float64).tiny
        scores = [group.importance / group.importance.mean().clamp(min=tiny) for group in groups]
        full, now = sum(group.full_width for group in groups), sum(map(len, scores))
        num_removed = max(0, round(full * ratio) - (full - now))
        removed = global_lowest(scores, [self._num_safe(group) for group in groups], num_removed)
        if removed is None:
            raise ModelError(
                f"pruning {ratio:.0%} of all channels is impossible while prune.max_ratio lets no layer lose more "
                f"than {self.max_ratio:.0%}: lower prune.ratio, or raise prune.max_ratio."
            )
        return [len(score) - less for score, less in zip(scores, removed, strict=True)]


@dataclass(frozen=True)
class Goal:
    """At most `share` of what `budget` counts in the `full` network."""

    budget: str
    share: float
    full: nn.Module
    example: Tensor
    latency: Callable[[nn.Module], float] | None

    def measure(self, model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], float]]:
        """Return the network to cut candidates from, `model` or a copy of it, and the function of their share."""
        if self.budget == "latency":
            if self.latency is None:
                raise ModelError('prune.budget = "latency" needs the `latency` argument of prune().')
            return model, self.latency
        try:  # without computing, where the forward reads no values
            return clone_without_hooks(model).to("meta"), self._share_of(clone_without_hooks(self.full).to("meta"))
        except (ModelError, NotImplementedError):
            return model, self._share_of(self.full)

    def size(self, model: nn.Module) -> int:
        """Return the number of parameters of a network, or of its multiply-accumulates."""
        channels, height, width = self.example.shape[1:]
        return count_macs(model, (channels, height, width)) if self.budget == "macs" else count_parameters(model)

    def _share_of(self, full: nn.Module) -> Callable[[nn.Module], float]:
        whole = self.size(full)
        return lambda candidate: self.size(candidate) / whole


@dataclass(frozen=True)
class Unreachable(Exception):
    """Even the smallest network is `share` of the full one."""

    share: float


def find_ratio(
    widths_at: Callable[[float], Widths],
    share_of: Callable[[Widths], float],
    goal: float,
    *,
    highest: float,
    max_measured: int | None = None,
) -> float:
    """Find, by bisection, the lowest ratio up to `highest` whose network is at most `goal` of the full network.

    `share_of` returns the share of the full network for some widths. It may be slow: it is called once for each widths,
    at most `max_measured` times; and noisy: the best network found counts.

    Raises:
        Unreachable: If the network at `highest` exceeds `goal`.
    """
    shares: dict[Widths, float] = {}
    ratios: dict[Widths, float] = {}

    def reaches(ratio: float) -> bool:
        widths = widths_at(ratio)
        if widths not in shares:
            shares[widths] = share_of(widths)
        ratios[widths] = min(ratio, ratios.get(widths, ratio))
        return shares[widths] <= goal

    if not reaches(highest):
        raise Unreachable(shares[widths_at(highest)])
    low, high = 0.0, highest
    if reaches(low):
        return low
    while high - low > RESOLUTION and widths_at(low) != widths_at(high):
        middle = (low + high) / 2
        if widths_at(middle) not in shares and len(shares) == max_measured:
            break
        low, high = (low, middle) if reaches(middle) else (middle, high)
    fits = [widths for widths, share in shares.items() if share <= goal]
    return ratios[max(fits, key=shares.__getitem__)]
