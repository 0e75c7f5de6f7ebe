"""Batch norm over the batch of all data-parallel processes, so that they train what one process with all of it would.

torch's own SyncBatchNorm does not run on a CPU, has no second derivative, and is another class, by which compression
would not know a network again. Here the modules stay what they are: for the time of a training, their forward is
another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.forms import widened
from stages.losses.global_batch import num_processes, one_row_of_each

Forward = Callable[[Tensor], Tensor]


@contextmanager
def batch_norm_over_processes(modules: nn.Module) -> Iterator[None]:
    """While the block runs, batch norms among `modules` that are in training mode take mean and variance over the
    batches of all processes, and keep running statistics of these. Nothing is changed where there is one process.
    """
    norms = [module for module in modules.modules() if isinstance(module, _BatchNorm)] if num_processes() > 1 else []
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, alone: Forward, maps: Tensor) -> Tensor:
    """maps [B, C, ...] to the same shape and type."""
    if not norm.training:
        return alone(maps)
    wide = widened(maps)
    count, mean, variance = global_moments(wide)
    # With two values here there is no need to look, for which the device would have to be waited.
    if maps.numel() < 2 * maps.shape[1] and count < 2:
        return alone(maps)  # which refuses it, or has its own way
    _remember(norm, count, mean.detach(), variance.detach())
    shape = [1, -1] + [1] * (maps.dim() - 2)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    normed = (wide - mean.view(shape)) * scale.view(shape)
    if norm.bias is not None:
        normed = normed + norm.bias.view(shape)
    return normed.to(maps.dtype)


def global_moments(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many values each channel has in the batches [B, C, ...] of all processes, a scalar, their mean [C], and their
    variance [C], divided by that number. No sums of squares are subtracted from each other: Chan et al. 1979.
    """
    values = maps.transpose(0, 1).flatten(1)
    num_here = values.shape[1]
    if num_here:
        variance, mean = torch.var_mean(values, 1, correction=0)
    else:
        variance = mean = values.sum(1)  # zeros, and part of the graph as in the other processes
    own = torch.cat([mean, variance, mean.new_full((1,), num_here)])
    means, variances, nums = torch.split(one_row_of_each(own), [len(mean), len(mean), 1], 1)
    nums = nums.detach()
    count = nums.sum()
    shares = nums / count.clamp_min(1)
    overall = (shares * means).sum(0)
    return count, overall, (shares * (variances + (means - overall).square())).sum(0)


def _remember(norm: _BatchNorm, count: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as torch does: their variance is divided by count - 1."""
    if norm.running_mean is None or norm.running_var is None:
        return
    share = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if share is None:
            share = 1 / float(norm.num_batches_tracked)
    share = 0.0 if share is None else share
    norm.running_mean.lerp_(mean.to(norm.running_mean), share)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var), share)
