"""Batch norm over the batches of all data-parallel processes, as one process with the whole batch computes it.

torch's SyncBatchNorm does not run on a CPU, has no second derivative, and is another class, which compression does not
recognize. Here the modules stay as they are, and only their forward is replaced during training. On a GPU it calls the
kernels of SyncBatchNorm, a dozen launches a layer instead of fifty, but does not wait for the device as that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_row, num_processes
from kdpipe.stages.runtime.distributed import torch_group_of

Forward = Callable[[Tensor], Tensor]

NO_ROWS = 1e-30
"""What the kernels get for a count of 0, which they would divide by: it rounds to 0 where it is added."""


@contextmanager
def batch_norm_over_processes(modules: nn.Module, *, twice_differentiable: bool = True) -> Iterator[None]:
    """Synchronize the batch norms in `modules` within the block; with one process nothing changes.

    In training mode they use, and track, mean and variance over the batches of all processes. The kernels for GPUs have
    no second derivative.
    """
    norms = [module for module in modules.modules() if isinstance(module, _BatchNorm)] if num_processes() > 1 else []
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward, not twice_differentiable)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, local: Forward, may_use_kernels: bool, maps: Tensor) -> Tensor:
    """Normalize maps [B, C, ...], keeping shape and type."""
    if not norm.training:
        return local(maps)
    if may_use_kernels and _have_kernels(norm, maps):
        return _forward_by_kernels(norm, local, maps)
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
    momentum = _momentum_after_counting(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var), momentum)


def _momentum_after_counting(norm: _BatchNorm) -> float:
    """Count the batch, and return its weight in the running statistics."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    return 0.0 if momentum is None else momentum


def _have_kernels(norm: _BatchNorm, maps: Tensor) -> bool:
    """Return whether the kernels fit: a property of module and device, the same in all processes."""
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return maps.is_cuda and all(one is not None and one.dtype is torch.float32 for one in tensors)


def _forward_by_kernels(norm: _BatchNorm, local: Forward, maps: Tensor) -> Tensor:
    maps, num_here = _dense(maps), maps.numel() // maps.shape[1]
    with torch.no_grad():
        if num_here:
            mean, inverse_std = torch.batch_norm_stats(maps, norm.eps)
        else:
            mean, inverse_std = torch.zeros_like(norm.weight), torch.ones_like(norm.weight)
        own = torch.cat([mean, inverse_std, mean.new_full((1,), num_here or NO_ROWS)])
        means, inverse_stds, nums = torch.split(all_gather_row(own), [len(mean), len(mean), 1], 1)
        nums = nums.flatten()
        if num_here < 2 and float(nums.sum()) < 2:
            return local(maps)
        statistics = (norm.running_mean, norm.running_var, _momentum_after_counting(norm), norm.eps)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(maps, means, inverse_stds, *statistics, nums)
    return _Normalize.apply(maps, norm.weight, norm.bias, mean, inverse_std, nums, norm.eps)  # type: ignore[no-any-return]


class _Normalize(torch.autograd.Function):
    """The normalization by given moments [C], whose gradient is by what the moments were computed from, too."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, *moments: Any) -> Tensor:
        mean, inverse_std, nums, eps = moments
        ctx.save_for_backward(maps, weight, mean, inverse_std, nums.to(torch.int32))
        return torch.batch_norm_elemt(maps, weight, bias, mean, inverse_std, eps) if maps.numel() else maps.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, inverse_std, nums = ctx.saved_tensors
        gradient, needed = _dense(gradient), ctx.needs_input_grad[:3]
        moments = (gradient, maps, mean, inverse_std, weight)
        if maps.numel():
            of_mean, products, of_weight, of_bias = torch.batch_norm_backward_reduce(*moments, *needed)
        else:
            of_mean = products = torch.zeros_like(mean)
            of_weight = of_bias = torch.zeros_like(weight)
        of_maps = None
        if needed[0]:
            sums = torch.cat([of_mean, products])
            dist.all_reduce(sums, group=torch_group_of(sums))
            of_mean, products = torch.split(sums, len(mean))
            of_maps = torch.batch_norm_backward_elemt(*moments, of_mean, products, nums) if maps.numel() else gradient
        return of_maps, of_weight if needed[1] else None, of_bias if needed[2] else None, None, None, None, None


def _dense(maps: Tensor) -> Tensor:
    """Return maps in a layout that the kernels know: channels last, or contiguous."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_known = maps.dim() in layouts and maps.is_contiguous(memory_format=layouts[maps.dim()])
    return maps if is_known else maps.contiguous()
