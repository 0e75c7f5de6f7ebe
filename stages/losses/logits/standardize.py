"""Logit standardization: logits of mean 0 and standard deviation 1, so that the student need not match the scale.

Sun et al. 2024, "Logit Standardization in Knowledge Distillation", CVPR (arXiv 2403.01427), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.stages.numerics import to_float32

EPS = 1e-7
"""Added to the standard deviation, as in the authors' code."""


def standardize_logits(logits: Tensor) -> Tensor:
    """Compute (z - mean) / (std + 1e-7) over the classes, with the unbiased std, in float32 or wider.

    [B, num_classes] to [B, num_classes]. Rows of equal logits, as those of one class, become zeros without a gradient.
    """
    # Minus the row's maximum, equal logits are exactly 0, and so is their deviation, however their mean is rounded.
    shifted = to_float32(logits)
    shifted = shifted - shifted.detach().amax(1, keepdim=True)
    centered = shifted - shifted.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / max(1, logits.shape[1] - 1)
    varies = variance > 0
    # sqrt(0) has an infinite derivative, which would be NaN even in the branch not taken.
    deviation = torch.where(varies, variance, 1).sqrt() + EPS
    return torch.where(varies, centered / deviation, 0)
