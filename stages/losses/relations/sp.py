"""Similarity-preserving distillation: match the pairwise similarities of the batch's samples.

SP: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", ICCV (arXiv 1907.09682).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.relations.relation import RelationLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import MAP


@section
class SP(RelationLoss):
    """Mean squared difference between the similarity matrices of the batch's samples, summed over pairs of layers.

    The default weight is that of RepDistiller.

    Attributes:
        layers: pairs of (student layer, teacher layer), whole outputs of any shapes: often the last maps; by default
            what goes into the classifiers, or what a teacher without one returns.
    """

    paper: ClassVar[str] = "Tung and Mori 2019, arXiv 1907.09682"
    requires: ClassVar[str] = "map [C, H, W] of each layer"
    statistic: ClassVar[str] = MAP

    loss: Literal["sp"] = "sp"
    weight: Scheduled = 3000.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sp_loss(student, teacher)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ||G_t - G_s||^2 / B^2, with G = F F^T [B, B], F the flattened features, and the rows L2-normalized.

    Features are [B, ...] of any two shapes. The result is a scalar in float32 or wider.

    Example:
        >>> sp_loss(torch.eye(4), torch.ones(4, 8))
        tensor(0.2500)
    """
    student = to_float32(student)
    return (similarities(teacher.to(student.dtype)) - similarities(student)).square().mean()


def similarities(features: Tensor) -> Tensor:
    """Compute the products of the batch's flattened features, [B, ...] to [B, B], with L2-normalized rows."""
    flat = features.flatten(1)
    return normalize_rows(flat @ flat.T)
