"""Prune in depth: remove the blocks whose absence changes the logits least.

They are removed one by one, each time the block without which the network does least harm; "Shortened LLaMA" (Kim et
al. 2024, arXiv:2402.02834) ranks them once, by perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kdpipe.stages.compress.pruning.blocks import Block, SkippedBlock, find_blocks, skip_blocks, skipped, skipped_paths
from kdpipe.stages.compress.pruning.budget import MAX_LATENCIES, Goal, Unreachable, find_ratio
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import get_module

Ranking = list[tuple[str, float]]
"""Blocks in the order of their removal, each with the harm without it and those before it."""


@dataclass(frozen=True)
class Ranker:
    """How blocks are ranked.

    Attributes:
        harm: Returns how far a network is from the stored logits.
        read: Paths of layers that losses read: a block with one inside stays.
        on_progress: Called with (done, total) after each block that is ranked.
    """

    harm: Callable[[nn.Module], float]
    read: Sequence[str] = ()
    on_progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Depth:
    """What may be removed of a network in depth, and how much.

    Attributes:
        share: Of the unpruned network's blocks.
        goal: In place of `share`, the budget to reach.
        max_ratio: The largest share of the blocks that may be removed.
        exclude: Modules that stay.
        ranker: How blocks are ranked.
    """

    share: float
    goal: Goal | None
    max_ratio: float
    exclude: Sequence[str]
    ranker: Ranker


def prune_blocks(
    model: nn.Module, full: nn.Module, example: Tensor, depth: Depth
) -> tuple[float, Ranking, Mapping[str, str]]:
    """Skip blocks of `model` in place; return the share of the blocks of `full` now removed, the ranking, what stays.

    The ranking is of the blocks removed now.

    Raises:
        ModelError: There are no blocks, nothing can be removed, or the goal cannot be reached.
    """
    for path in depth.exclude:
        get_module(full, path)
    blocks, excluded = find_blocks(model, example, exclude=depth.exclude, read=depth.ranker.read)
    whole = blocks
    if skipped_paths(model):
        whole = find_blocks(full, example, exclude=depth.exclude, read=depth.ranker.read)[0]
    gone = sum(isinstance(model.get_submodule(block[0]), SkippedBlock) for block in whole)
    if not whole:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(excluded.items())[:3])
        raise ModelError(
            "no block of this model can be removed: none gives an output of its input's shape, or all are needed "
            f"({reasons or 'it has none'}); set compress.prune.kind = 'channels', or compress.steps = ['quantize']."
        )
    most = max(0, min(len(blocks), math.floor(depth.max_ratio * len(whole) + 1e-6) - gone))
    if depth.goal is None:
        wanted = round(depth.share * len(whole))
        if wanted - gone > most:
            raise ModelError(
                f"pruning {depth.share:.0%} of this model's {len(whole)} blocks is impossible while prune.max_ratio "
                f"lets it lose {depth.max_ratio:.0%}: lower prune.ratio, or raise prune.max_ratio."
            )
        most = max(0, wanted - gone)
    ranking = list(rank_blocks(model, blocks, depth.ranker, most))
    order = [block for block, _ in ranking]
    count = most if depth.goal is None else _num_removed(model, order, depth)
    skip_blocks(model, [path for block in order[:count] for path in block])
    return (gone + count) / len(whole), [(block[0], harm) for block, harm in ranking[:count]], excluded


def rank_blocks(model: nn.Module, blocks: Sequence[Block], ranker: Ranker, most: int) -> Iterator[tuple[Block, float]]:
    """Yield the first `most` blocks to remove, each with the harm without it and those before it.

    A block is measured again without those before it once it is the lowest: what it did in an earlier round counts as
    the least that it does now, so that a round measures few of them. Of equal ones the first goes.
    """
    removed: list[str] = []
    harms = dict.fromkeys(blocks, -math.inf)
    for number in range(most):
        measured = set[Block]()
        while (lowest := min(harms, key=harms.__getitem__)) not in measured:
            with skipped(model, [*removed, *lowest]):
                found = ranker.harm(model)
            harms[lowest] = found if math.isfinite(found) else math.inf
            measured.add(lowest)
        removed += lowest
        ranker.on_progress(number + 1, most)
        yield lowest, harms.pop(lowest)


def _num_removed(model: nn.Module, order: Sequence[Block], depth: Depth) -> int:
    """Return how many blocks to remove in order, the fewest that reach the goal."""
    assert depth.goal is not None
    model, share_of_model = depth.goal.measure(model)

    def share_of(counts: tuple[int, ...]) -> float:
        candidate = clone_without_hooks(model)
        return share_of_model(skip_blocks(candidate, [path for block in order[: counts[0]] for path in block]))

    limit = MAX_LATENCIES if depth.goal.budget == "latency" else None
    try:
        ratio = find_ratio(
            lambda ratio: (round(ratio * len(order)),), share_of, depth.goal.share, highest=1.0, max_measured=limit
        )
    except Unreachable as end:
        raise ModelError(
            f"removing blocks cannot leave {depth.goal.share:.1%} of this model's {depth.goal.budget}: without "
            f"{len(order)} of them it is {end.share:.1%}; lower prune.ratio, raise prune.max_ratio "
            f"({depth.max_ratio:g}), or exclude less."
        ) from end
    return round(ratio * len(order))
