"""Base classes of losses that compare relations between the samples of a batch: one value for the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import PooledLoss
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.targets.feature_spec import POOLED, FeatureSpec, Shape, compute_statistic, statistic_shape
from kdpipe.stages.targets.statistics import pooled


@section
class RelationLoss(PooledLoss):
    """Configuration of a loss of the features of the batch of all processes, summed over pairs of layers."""

    per_sample: ClassVar[bool] = False

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss at one pair of layers, a scalar, from `statistic` of student and teacher, [B, ...] each."""
        raise NotImplementedError

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return RelationModule(self.compare, FeatureSpec(pair[0], self.statistic))


class RelationModule(nn.Module):
    """The comparison of a statistic of student and teacher at one pair of layers, over the batch of all processes."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor], student: FeatureSpec) -> None:
        super().__init__()
        self.compare = compare
        self.student = student

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.compare(
            all_gather_with_grad(compute_statistic(self.student, student)), all_gather_with_grad(teacher)
        )


class Embedding(nn.Module):
    """Average pooling over positions, then a linear layer: [B, *shape] to [B, dim]."""

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(statistic_shape(FeatureSpec("", POOLED), shape)[0], dim)

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.linear(pooled(features).to(self.linear.weight.dtype))
        return embedded
