"""Which samples make up a batch, and what a step draws: pure functions of (seed, epoch, step).

A killed job resumes at the very batch where it stopped because nothing here has a state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^63) for one purpose, from the recipe's seed and what tells the purpose from others."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """A permutation of the samples, int64 [N]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


def slab_order(seed: int, epoch: int, slabs: Tensor, window: int) -> Tensor:
    """A permutation of the samples, int64 [N], that asks for one slab of a store after the other.

    slabs: int64 [N], the shard in which each sample's targets lie. The slabs are shuffled, and `window` of them at a
    time are mixed; because a store's rows stand in an order that looks random, this mixes much like a full shuffle
    while each slab is read once an epoch.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "slabs", epoch))
    present = torch.unique(slabs)
    rank = torch.empty(int(present.max()) + 1, dtype=torch.int64)
    rank[present] = torch.randperm(len(present), generator=generator)
    shuffled = torch.randperm(len(slabs), generator=generator)
    return shuffled[torch.argsort(rank[slabs[shuffled]] // window, stable=True)]


def num_steps(num_samples: int, batch_size: int) -> int:
    """Batches in an epoch. All are full: the few samples left over sit out, others each epoch."""
    return max(1, num_samples // batch_size)


def batch_indices(order: Tensor, step: int, batch_size: int) -> Tensor:
    """The samples of batch number `step`, int64 [B]: B is `batch_size`, or all there are where they are fewer."""
    return order[step * batch_size : (step + 1) * batch_size]
