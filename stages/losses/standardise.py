"""Logits of mean 0 and standard deviation 1 over the classes: the student need not copy the teacher's scale.

Logit standardisation, Sun et al. 2024 (arXiv 2403.01427), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.features import TeacherOutputs
from stages.forms import Wanted, widened

EPS = 1e-7
"""Added to the standard deviation, as in the authors' code."""


@dataclass(frozen=True)
class Standardised:
    """What a teacher says, with standardised logits."""

    inner: TeacherOutputs

    @property
    def features(self) -> Mapping[Wanted, Tensor]:
        return self.inner.features

    def logits_at(self, temperature: float) -> Tensor:
        return standardised(self.inner.logits_at(temperature))

    def rows(self, index: Tensor) -> Standardised:
        return Standardised(self.inner.rows(index))


def standardised(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) over the classes, std with num_classes - 1: [B, num_classes] to the same, in float32
    or wider.

    A row of equal logits, and all rows of one class, give zeros without a gradient: they have no direction to keep.
    """
    # Less a row's largest logit, equal ones are exactly 0 and so is their deviation, whatever their mean is rounded to.
    shifted = widened(logits)
    shifted = shifted - shifted.detach().amax(1, keepdim=True)
    centred = shifted - shifted.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(1, logits.shape[1] - 1)
    varies = variance > 0
    # The root of zero has an infinite derivative, which would be NaN even where it is not chosen.
    deviation = torch.where(varies, variance, 1).sqrt() + EPS
    return torch.where(varies, centred / deviation, 0)
