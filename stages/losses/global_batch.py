"""The batch of all data-parallel processes together: what a loss about the relations between samples is taken over.

A loss about pairs or triplets of samples is another loss when each process takes it over its own shard. So each
process gathers all rows, and computes the same number. The gradient of a row is the sum of what the processes say of
it, world size times the gradient of the loss; as training takes the mean of the parameters' gradients over the
processes, what arrives at a parameter is the gradient that one process with the whole batch would have.

A shard may have more rows than another, or none: samples are chosen, or have no targets. All processes come here
equally often all the same, and all go backward from here where one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.processes import group_of


def num_processes() -> int:
    """How many data-parallel processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(number: int) -> int:
    """The sum of the processes' numbers."""
    if num_processes() == 1:
        return number
    everyone = torch.tensor([number])
    dist.all_reduce(everyone)
    return int(everyone)


def part_of_mean(values: Tensor, num_samples: int) -> Tensor:
    """This process's part of the mean over the global batch, of num_samples, of one number a sample, [B]; a scalar.

    The mean over the processes of these is that mean, however many rows each has.
    """
    count = num_processes()
    return values.mean() if count == 1 else values.sum() * (count / num_samples)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all data-parallel processes in rank order, [B, ...] to [sum of all B, ...], with gradients, also
    those of gradients. The same tensor where there is one process.
    """
    return gathered_from(rows)[0]


def gathered_from(rows: Tensor) -> tuple[Tensor, int]:
    """`gathered`, and the place among all rows at which this process's begin."""
    if num_processes() == 1:
        return rows, 0
    sizes = _sizes(len(rows))
    everyone: Tensor = _Gathered.apply(rows, sizes)
    return everyone, sum(sizes[: dist.get_rank()])


def one_row_of_each(row: Tensor) -> Tensor:
    """`gathered` of exactly one row from each process, [...] to [world, ...]."""
    everyone: Tensor = _Gathered.apply(row[None], [1] * num_processes())
    return everyone


def _sizes(size: int) -> list[int]:
    """The numbers of rows of all processes, in rank order."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_processes())]
    dist.all_gather(sizes, torch.tensor([size]))
    return [int(one) for one in sizes]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.contiguous()
        if len(rows) < max(sizes):
            padded = torch.cat([padded, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
        shards = [torch.empty_like(padded) for _ in sizes]
        if max(sizes):
            dist.all_gather(shards, padded, group=group_of(padded))
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank = dist.get_rank()
        everyone: Tensor = _Summed.apply(gradients[0])
        return torch.split(everyone, list(ctx.sizes))[rank], None


class _Summed(torch.autograd.Function):
    """The sum over the processes, whose gradient is that of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        total = shard.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group_of(total))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed: Tensor = _Summed.apply(gradients[0])
        return summed
