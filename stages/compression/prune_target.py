"""How many channels of each group stay: from a share of the channels, or from a goal for the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stages.compression.channel_groups import ChannelGroup
from stages.compression.rank import least_of_all
from stages.errors import ModelError

Widths = tuple[int, ...]

MAX_LATENCIES = 7
"""Networks whose latency a search measures at most."""

RESOLUTION = 2.0**-16
"""Channel ratios closer than this are one."""


@dataclass(frozen=True)
class Shares:
    """How a channel ratio is dealt out to the groups; see PruneConfig. `spare_one`: no lane loses its last channel,
    where otherwise that is an error."""

    scope: Literal["global", "layer"]
    max_ratio: float
    round_to: int
    spare_one: bool = False

    def left(self, groups: Sequence[ChannelGroup], ratio: float) -> Widths:
        """How many channels of each lane stay, group by group, when `ratio` of the unpruned ones is gone.

        Raises ModelError if a group would be left without channels, or `max_ratio` forbids the ratio.
        """
        left: Sequence[float] = [group.full_width * (1 - ratio) for group in groups]
        if self.scope == "global":
            left = self._left_by_rank(groups, ratio)
        for group, num_kept in zip(groups, left, strict=True):
            if num_kept < 0.5 and not self.spare_one:
                raise ModelError(
                    f"pruning {ratio:.0%} would leave {group.path!r} ({group.full_width * group.num_lanes} channels) "
                    "without a channel: lower prune.ratio, or name the module in prune.exclude."
                )
        return tuple(self._rounded(group, num_kept) for group, num_kept in zip(groups, left, strict=True))

    def most(self, groups: Sequence[ChannelGroup]) -> float:
        """The highest ratio that `left` takes with `spare_one`."""
        full = sum(group.full_width for group in groups)
        return 1 - sum(self._num_safe(group) for group in groups) / full if self.scope == "global" else 1.0

    def _rounded(self, group: ChannelGroup, num_kept: float) -> int:
        step = max(1, self.round_to // group.num_lanes)
        rounded = max(step, step * math.floor(num_kept / step + 0.5))
        return min(len(group.importance), rounded)

    def _num_safe(self, group: ChannelGroup) -> int:
        safe = math.ceil(round(group.full_width * (1 - self.max_ratio), 6))  # 10 * (1 - 0.9) is a bit more than 1
        return max(1, safe) if self.spare_one else safe

    def _left_by_rank(self, groups: Sequence[ChannelGroup], ratio: float) -> list[int]:
        """How many channels of each group stay when the least important of all go, and none loses over max_ratio."""
        tiny = torch.finfo(torch.float64).tiny
        scores = [group.importance / group.importance.mean().clamp(min=tiny) for group in groups]
        full, now = sum(group.full_width for group in groups), sum(map(len, scores))
        num_removed = max(0, round(full * ratio) - (full - now))
        gone = least_of_all(scores, [self._num_safe(group) for group in groups], num_removed)
        if gone is None:
            raise ModelError(
                f"pruning {ratio:.0%} of all channels is impossible while prune.max_ratio lets no layer lose more "
                f"than {self.max_ratio:.0%}: lower prune.ratio, or raise prune.max_ratio."
            )
        return [len(score) - less for score, less in zip(scores, gone, strict=True)]


@dataclass(frozen=True)
class Unreachable(Exception):
    """Even the smallest network is `share` of the full one."""

    share: float


def find_ratio(
    widths_at: Callable[[float], Widths],
    share_of: Callable[[Widths], float],
    goal: float,
    *,
    most: float,
    max_measured: int | None = None,
) -> float:
    """The least channel ratio up to `most` whose network has at most `goal` of the full network, by bisection.

    `share_of` tells what a network with these widths has of the full one; it is called once for each widths met, at
    most `max_measured` times, so that it may be slow, and the best network met counts, so that it may be noisy.
    Raises Unreachable if the network at `most` has more than `goal`.
    """
    shares: dict[Widths, float] = {}
    ratios: dict[Widths, float] = {}

    def reaches(ratio: float) -> bool:
        widths = widths_at(ratio)
        if widths not in shares:
            shares[widths] = share_of(widths)
        ratios[widths] = min(ratio, ratios.get(widths, ratio))
        return shares[widths] <= goal

    if not reaches(most):
        raise Unreachable(shares[widths_at(most)])
    low, high = 0.0, most
    if reaches(low):
        return low
    while high - low > RESOLUTION and widths_at(low) != widths_at(high):
        middle = (low + high) / 2
        if widths_at(middle) not in shares and len(shares) == max_measured:
            break
        low, high = (low, middle) if reaches(middle) else (middle, high)
    fits = [widths for widths, share in shares.items() if share <= goal]
    return ratios[max(fits, key=shares.__getitem__)]
