"""Gradient clipping: by the norm of all gradients, by value, or adaptively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from kdpipe.stages.training.optimization.timm_glue import import_timm

ClipMode = Literal["norm", "value", "agc"]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, mode: ClipMode) -> None:
    """Clip gradients in place.

    Args:
        parameters: All trained parameters.
        limit: The largest norm of all gradients together, the largest absolute value, or the largest ratio of the norm
            of a unit's gradient to that of its weights.
        mode: "norm", "value", or "agc" for adaptive gradient clipping (Brock et al. 2021), of timm.

    Raises:
        RecipeError: The mode is "agc", and timm is not installed.
    """
    if mode == "norm":
        clip_grad_norm_(parameters, limit)
    elif mode == "value":
        clip_grad_value_(parameters, limit)
    else:
        import_timm("utils", "train.clip_grad_mode = 'agc'").adaptive_clip_grad(parameters, limit)
