"""Formulas in place of torch's CUDA kernels for batch norm over processes, after aten/src/ATen/native/cuda."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from kdpipe.stages.runtime import sync_batch_norm


@contextmanager
def played() -> Iterator[None]:
    """Use the kernels for all batch norms, on a CPU."""
    played_ones = (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt)
    names = {f"batch_norm_{one.__name__}": one for one in played_ones}
    with patch.multiple(torch, **names), patch.object(sync_batch_norm, "_have_kernels", lambda norm, maps: True):
        yield


def stats(maps: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_by_channel(maps), 1, correction=0)
    return mean, (variance + eps).rsqrt()


def gather_stats_with_counts(
    maps: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    n, mean, squares = torch.zeros(()), torch.zeros(maps.shape[1]), torch.zeros(maps.shape[1])
    for its_mean, its_inverse_std, count in zip(means, inverse_stds, counts, strict=True):
        factor = 1 / (n + count)
        squares = squares + (its_inverse_std**-2 - eps) * count + (mean - its_mean).square() * n * count * factor
        mean = n * factor * mean + count * factor * its_mean
        n = (n + count).floor()  # an integer there
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(squares / (n - 1), momentum)
    return mean, (squares / n + eps).rsqrt()


def elemt(maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    return _wide((maps.transpose(1, -1) - mean) * inverse_std * weight + bias)


def backward_reduce(
    gradient: Tensor, maps: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, *needed: bool
) -> tuple[Tensor, ...]:
    rows = _by_channel(gradient)
    products = (rows * (_by_channel(maps) - mean[:, None])).sum(1)
    return rows.sum(1), products, products * inverse_std, rows.sum(1)


def backward_elemt(
    gradient: Tensor,
    maps: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    sums: Tensor,
    products: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype is torch.int32
    n = counts.sum()
    centered = (maps.transpose(1, -1) - mean) * (products / n * inverse_std.square())
    return _wide((gradient.transpose(1, -1) - sums / n - centered) * (weight * inverse_std))


def _by_channel(maps: Tensor) -> Tensor:
    return maps.transpose(0, 1).flatten(1)


def _wide(channels_last: Tensor) -> Tensor:
    return channels_last.transpose(1, -1)
