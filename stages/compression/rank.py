"""Rank values globally by importance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def global_lowest(scores: Sequence[Tensor], num_safe: Sequence[int], num_removed: int) -> list[int] | None:
    """Count how many of each of `scores` [N_i] are among the `num_removed` lowest of all.

    The `num_safe` largest of each are protected. Of equal scores the first ones go. Returns None if so many cannot go.
    """
    if not scores:
        return None if num_removed > 0 else []
    candidates = [score.clone() for score in scores]
    for score, num_protected in zip(candidates, num_safe, strict=True):
        score[score.argsort(descending=True, stable=True)[:num_protected]] = torch.inf
    ranked = torch.cat(candidates)
    if num_removed > int(ranked.isfinite().sum()):
        return None
    removed = torch.zeros(len(ranked), dtype=torch.bool)
    removed[ranked.argsort(stable=True)[:num_removed]] = True
    return [int(part.sum()) for part in torch.split(removed, [len(score) for score in scores])]
