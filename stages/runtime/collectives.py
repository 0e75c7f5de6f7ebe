"""Collectives for losses of the global batch, which all data-parallel processes share.

A loss on pairs or triplets of samples changes if each process computes it on its own shard. Therefore each process
gathers all rows and computes the same value. The gradient of a row is the sum over the processes: world size times the
gradient of the loss. As training averages the parameters' gradients over the processes, a parameter gets the gradient
that one process with the whole batch would compute.

Shards may differ in size, or be empty, as samples are selected or have no targets. All processes must still call these
functions equally often, and run the backward pass if any of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdpipe.stages.runtime.distributed import torch_group_of


def num_processes() -> int:
    """Return the number of data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(number: int) -> int:
    """Return the sum of a number over all processes."""
    if num_processes() == 1:
        return number
    result = torch.tensor([number])
    dist.all_reduce(result)
    return int(result)


def local_share_of_mean(values: Tensor, num_samples: int) -> Tensor:
    """Return this process's share, a scalar, of the mean of per-sample values [B] over the global batch.

    The mean of the shares over the processes is the mean over all `num_samples` values, however many rows each has.
    """
    count = num_processes()
    return values.mean() if count == 1 else values.sum() * (count / num_samples)


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order, [B, ...] to [sum of all B, ...], twice differentiable.

    Returns the same tensor if there is one process.
    """
    return all_gather_with_offset(rows)[0]


def all_gather_with_offset(rows: Tensor) -> tuple[Tensor, int]:
    """Return `all_gather_with_grad`, and the index of this process's first row."""
    if num_processes() == 1:
        return rows, 0
    sizes = _sizes(len(rows))
    return _AllGather.apply(rows, sizes), sum(sizes[: dist.get_rank()])


def all_gather_row(row: Tensor) -> Tensor:
    """Gather exactly one row from each process, [...] to [world size, ...], twice differentiable."""
    count = num_processes()
    return row[None] if count == 1 else _AllGather.apply(row[None], [1] * count)


def _sizes(size: int) -> list[int]:
    """Return the numbers of rows of all processes, in rank order."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_processes())]
    dist.all_gather(sizes, torch.tensor([size]))
    return [int(count) for count in sizes]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.contiguous()
        if len(rows) < max(sizes):
            padded = torch.cat([padded, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
        shards = [torch.empty_like(padded) for _ in sizes]
        if max(sizes):
            dist.all_gather(shards, padded, group=torch_group_of(padded))
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank = dist.get_rank()
        return torch.split(_AllReduceSum.apply(gradients[0]), list(ctx.sizes))[rank], None


class _AllReduceSum(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        result = shard.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=torch_group_of(result))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradients[0])  # type: ignore[no-any-return]
