"""Batch norm over the batches of all data-parallel processes, as one process with the whole batch computes it.

torch's SyncBatchNorm does not run on a CPU, has no second derivative, and is another class, which compression does not
recognize. Here the modules stay as they are, and only their forward is replaced during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_row, num_processes

Forward = Callable[[Tensor], Tensor]


@contextmanager
def batch_norm_over_processes(modules: nn.Module) -> Iterator[None]:
    """Synchronize the batch norms in `modules` within the block; with one process nothing changes.

    In training mode they use, and track, mean and variance over the batches of all processes.
    """
    norms = [module for module in modules.modules() if isinstance(module, _BatchNorm)] if num_processes() > 1 else []
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, local: Forward, maps: Tensor) -> Tensor:
    """Normalize maps [B, C, ...], keeping shape and type."""
    if not norm.training:
        return local(maps)
    wide = to_float32(maps)
    count, mean, variance = global_moments(wide)
    # The count is read, which waits for the device, only if there are not two values here.
    if maps.numel() < 2 * maps.shape[1] and count < 2:
        return local(maps)  # raises, or handles it in its own way
    _update_running(norm, count, mean.detach(), variance.detach())
    shape = [1, -1] + [1] * (maps.dim() - 2)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    normed = (wide - mean.view(shape)) * scale.view(shape)
    if norm.bias is not None:
        normed = normed + norm.bias.view(shape)
    return normed.to(maps.dtype)


def global_moments(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of values per channel of maps [B, C, ...], a scalar, their mean [C] and biased variance [C].

    They are over all processes. No sums of squares are subtracted from each other (Chan et al. 1979).
    """
    values = maps.transpose(0, 1).flatten(1)
    num_here = values.shape[1]
    if num_here:
        variance, mean = torch.var_mean(values, 1, correction=0)
    else:
        variance = mean = values.sum(1)  # zeros that are part of the graph, as in the other processes
    own = torch.cat([mean, variance, mean.new_full((1,), num_here)])
    means, variances, nums = torch.split(all_gather_row(own), [len(mean), len(mean), 1], 1)
    nums = nums.detach()
    count = nums.sum()
    shares = nums / count.clamp_min(1)
    overall = (shares * means).sum(0)
    return count, overall, (shares * (variances + (means - overall).square())).sum(0)


def _update_running(norm: _BatchNorm, count: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics as torch does, with the unbiased variance."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    momentum = 0.0 if momentum is None else momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var), momentum)
