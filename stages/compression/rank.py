"""The least important of all, wherever they are: how many of them each layer or group has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def least_of_all(scores: Sequence[Tensor], num_safe: Sequence[int], num_gone: int) -> list[int] | None:
    """How many of each of `scores` [N_i] are among the `num_gone` smallest of all, its own `num_safe` largest aside.

    None where so many cannot go. Of equal scores the first ones go.
    """
    if not scores:
        return None if num_gone > 0 else []
    open_ones = [score.clone() for score in scores]
    for score, safe in zip(open_ones, num_safe, strict=True):
        score[score.argsort(descending=True, stable=True)[:safe]] = torch.inf
    ranked = torch.cat(open_ones)
    if num_gone > int(ranked.isfinite().sum()):
        return None
    gone = torch.zeros(len(ranked), dtype=torch.bool)
    gone[ranked.argsort(stable=True)[:num_gone]] = True
    return [int(part.sum()) for part in torch.split(gone, [len(score) for score in scores])]
