"""Sample order and batches, as stateless functions of (seed, epoch, step), so that a killed job can resume."""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.stages.numerics import derive_seed


def epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """Return a permutation of the samples, int64 [N]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


def balanced_order(seed: int, epoch: int, labels: Tensor, num_samples: int) -> Tensor:
    """Return `num_samples` samples, int64 [n], of which each class has n / num_classes, rounded, in random order.

    A class's samples are drawn without replacement until all were drawn, then again: as often as by a sampler whose
    weights are the inverse sizes of the classes, without its chance. labels: int64 [N].
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "balanced", epoch))
    _, counts = torch.unique(labels, return_counts=True)
    share, rest = divmod(num_samples, len(counts))
    wanted = share + (torch.randperm(len(counts), generator=generator) < rest).long()
    drawn = []
    of_class = torch.tensor_split(labels.argsort(stable=True), counts.cumsum(0)[:-1])
    for rows, number in zip(of_class, wanted.tolist(), strict=True):
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(-(-number // len(rows)))]
        drawn += [rows[torch.cat(orders)[:number]]] if orders else []
    chosen = torch.cat(drawn)
    return chosen[torch.randperm(len(chosen), generator=generator)]


def shard_order(seed: int, epoch: int, slabs: Tensor, window: int) -> Tensor:
    """Return a permutation of the samples, int64 [N], that reads each slab (shard) of a store once per epoch.

    The slabs are shuffled, and `window` of them at a time are mixed; since a store's rows are in pseudo-random order,
    this mixes almost like a full shuffle. `slabs` is the shard that stores each sample's targets, int64 [N].
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "slabs", epoch))
    present = torch.unique(slabs)
    rank = torch.empty(int(present.max()) + 1, dtype=torch.int64)
    rank[present] = torch.randperm(len(present), generator=generator)
    shuffled = torch.randperm(len(slabs), generator=generator)
    return shuffled[torch.argsort(rank[slabs[shuffled]] // window, stable=True)]


def num_steps(num_samples: int, batch_size: int) -> int:
    """Return the number of batches per epoch. All are full; the rest of the samples differs in each epoch."""
    return max(1, num_samples // batch_size)


def batch_indices(order: Tensor, step: int, batch_size: int) -> Tensor:
    """Return the samples of batch number `step`, int64 [B]: B is `batch_size`, or all samples if they are fewer."""
    return order[step * batch_size : (step + 1) * batch_size]
