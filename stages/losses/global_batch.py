"""The batch of all data-parallel processes together: what a loss about the relations between samples is taken over.

A loss about pairs or triplets of samples is another loss when each process takes it over its own shard. So each
process gathers all rows, and computes the same number. The gradient of a row is the sum of what the processes say of
it, world size times the gradient of the loss; as DistributedDataParallel takes the mean of the parameters' gradients
over the processes, what arrives at a parameter is the gradient that one process with the whole batch would have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all data-parallel processes in rank order, [B, ...] to [world B, ...], with gradients.

    The same tensor where there is one process. B must be the same in all of them, they must come here equally often,
    and all go backward from here where one does.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    everyone: Tensor = _Gathered.apply(rows)
    return everyone


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        shards = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, rows)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
