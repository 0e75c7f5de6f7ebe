"""Base classes of losses that compare relations between the samples of a batch: one value for the global batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import FeatureLossConfig
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.targets.feature_spec import POOLED, FeatureSpec, Shape, compute_statistic, statistic_shape
from kdpipe.stages.targets.statistics import pooled


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

    def compute(self, inputs: LossInputs) -> Tensor:
        parts = [
            self.compare(
                all_gather_with_grad(
                    compute_statistic(
                        FeatureSpec(student_layer, self.statistic), inputs.student.features[student_layer]
                    )
                ),
                all_gather_with_grad(inputs.teacher.features[FeatureSpec(teacher_layer, self.statistic)]),
            )
            for student_layer, teacher_layer in self.layers
        ]
        return torch.stack(parts).sum()


class Embedding(nn.Module):
    """Average pooling over positions, then a linear layer: [B, *shape] to [B, dim]."""

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(statistic_shape(FeatureSpec("", POOLED), shape)[0], dim)

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.linear(pooled(features).to(self.linear.weight.dtype))
        return embedded
