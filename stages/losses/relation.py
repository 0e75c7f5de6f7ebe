"""Base classes of losses that compare relations between the samples of a batch: one value for the global batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stages.config import section
from stages.forms import POOLED, Wanted, take_form
from stages.losses.entry import FeatureLossConfig
from stages.losses.global_batch import gathered
from stages.losses.said import Said


@section
class RelationLossConfig(FeatureLossConfig):
    """Configuration of a loss of the features of the batch of all processes, summed over pairs of layers.

    Attributes:
        layers: pairs of (student layer, teacher layer), of which maps are average-pooled to vectors: usually the last
            before the classifier.
    """

    per_sample: ClassVar[bool] = False
    statistic: ClassVar[str] = POOLED

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss at one pair of layers, a scalar, from `statistic` of student and teacher, [B, ...] each."""
        raise NotImplementedError

    def compute(self, inputs: Said) -> Tensor:
        parts = [
            self.compare(
                gathered(take_form(Wanted(student_layer, self.statistic), inputs.student.features[student_layer])),
                gathered(inputs.teacher.features[Wanted(teacher_layer, self.statistic)]),
            )
            for student_layer, teacher_layer in self.layers
        ]
        return torch.stack(parts).sum()
