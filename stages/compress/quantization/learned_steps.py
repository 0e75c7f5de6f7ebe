"""Learned step sizes: the scales of weights and activations are trained with the weights (LSQ).

The method is that of Esser et al. 2020, arXiv:1902.08153, with one step size per output channel of a weight. The zero
points of activations stay those of the calibration. All steps start as the observed ones: from the paper's
2 mean|w| / sqrt(Q) the loss was higher in the first and in the last epoch, with 8 and with 4 bits (RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LearnedRounding(torch.autograd.Function):
    """Return `rounded`, with the gradients of `learned_rounding`; `bounds` is [2]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, step_size, rounded, scale, bounds, num_values = arguments
        ctx.save_for_backward(x, step_size, scale, bounds)
        ctx.num_values = num_values
        result: Tensor = rounded.view_as(rounded)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, step_size, scale, (lowest, highest) = ctx.saved_tensors
        steps = x / scale.view(-1, *[1] * (x.dim() - 1)) if scale.dim() else x / scale
        is_inside = (steps > lowest) & (steps < highest)
        slope = torch.where(is_inside, torch.round(steps) - steps, torch.clamp(steps, lowest, highest))
        of_step = (gradient * slope).flatten(1).sum(dim=1) if scale.dim() else (gradient * slope).sum()
        is_raised = scale != step_size.abs()  # by a floor: then it is no longer the step size's
        factor = torch.sign(step_size) * ~is_raised / torch.sqrt(ctx.num_values * torch.maximum(highest, -lowest - 1))
        return gradient * is_inside, of_step * factor, None, None, None, None


def learned_rounding(
    x: Tensor, step_size: Tensor, rounded: Tensor, *, scale: Tensor, bounds: Tensor, num_values: int
) -> Tensor:
    """Return `rounded`, the values x on their grid, with the gradients of LSQ for x and for the step size.

    Within the grid the gradient of x passes through, and that of the step is round(x/s) - x/s; beyond it they are 0 and
    the grid's end. The gradient of the step is divided by sqrt(num_values * highest), which balances it with that of
    the weights; of a grid that is longer below zero, that end counts.

    Args:
        x: What was rounded, float32, of any shape.
        step_size: The parameter, [], or [O] for x [O, ...].
        rounded: x on its grid.
        scale: The step between two values of the grid, of the shape of `step_size`: its magnitude, or more.
        bounds: The integers of the grid's lowest and highest value, if that of zero is 0, [2].
        num_values: How many values share the step: the weights of a channel, the activations of an image.
    """
    result: Tensor = _LearnedRounding.apply(x, step_size, rounded, scale, bounds, num_values)
    return result
