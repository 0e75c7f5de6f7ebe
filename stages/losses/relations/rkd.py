"""Relational knowledge distillation: match distances of pairs and angles of triplets.

RKD: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", CVPR (arXiv 1904.05068).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.relations.relation import RelationLoss
from kdpipe.stages.numerics import normalize_rows, to_float32

MAX_COSINES = 2**22
"""The largest number of elements of a tensor of cosines, or of their differences: 16 MiB in float32.

Larger batches are computed in blocks, with their gradient; a block has at least one anchor.
"""

EPS = 1e-12
"""The smallest squared distance of two samples; below it there is no gradient."""


@section
class RKD(RelationLoss):
    """Differences of distances and of angles between the batch's samples, summed over pairs of layers.

    Default weights are those of RepDistiller.

    Attributes:
        distance_weight: weight of the distances of pairs.
        angle_weight: weight of the angles of triplets, whose cost grows with the cube of the batch size.
    """

    paper: ClassVar[str] = "Park et al. 2019, arXiv 1904.05068"

    loss: Literal["rkd"] = "rkd"
    distance_weight: Annotated[float, Field(ge=0), max_value(10**9)] = 25.0
    angle_weight: Annotated[float, Field(ge=0), max_value(10**9)] = 50.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_loss(student, teacher, self.distance_weight, self.angle_weight)


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Compute distance_weight * `distance_loss` + angle_weight * `angle_loss`; 0 for a batch of one.

    Features are [B, D] and [B, D']. The result is a scalar in float32 or wider.

    Example:
        >>> rkd_loss(torch.eye(3), torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(6.0185)
    """
    student = to_float32(student)
    teacher = teacher.to(student.dtype)
    loss = student.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * distance_loss(student, teacher)
    if angle_weight:
        loss = loss + angle_weight * angle_loss(student, teacher)
    return loss


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber loss (delta 1) between `relative_distances`, averaged over B^2, a scalar."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def relative_distances(vectors: Tensor) -> Tensor:
    """Compute the pairwise Euclidean distances, [B, D] to [B, B], divided by their mean over pairs of two samples."""
    num = len(vectors)
    centered = vectors - vectors.mean(0)  # keeps precision where the mean is far from 0
    squares = centered.square().sum(1)
    squared_distances = squares[:, None] + squares - 2 * centered @ centered.T
    diagonal = torch.eye(num, dtype=torch.bool, device=vectors.device)
    distances = squared_distances.clamp_min(EPS).sqrt().masked_fill(diagonal, 0.0)
    mean = distances.sum() / max(1, num * (num - 1))
    return distances / mean.clamp_min(EPS)


def angle_loss(student: Tensor, teacher: Tensor, max_cosines: int = MAX_COSINES) -> Tensor:
    """Compute the Huber loss (delta 1) between the cosines at i of all triplets (i, j, k), averaged over B^3, a scalar.

    Triplets in which i is j or k have a cosine of 0. Blocks of anchors i with up to `max_cosines` elements give the
    same result up to the order of summation.
    """
    num, width = len(student), max(student.shape[1], teacher.shape[1])
    anchors = max(1, max_cosines // (num * max(num, width)))
    if anchors >= num:
        return _angle_differences(student, teacher, 0, num) / num**3
    total: Tensor = _InBlocks.apply(student, teacher, anchors)
    return total / num**3


class _InBlocks(torch.autograd.Function):
    """The sum over all anchors, whose gradient is computed block by block in the forward pass to save memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, anchors: int) -> Tensor:
        leaf = student.detach().requires_grad_(ctx.needs_input_grad[0])
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        for start in range(0, len(student), anchors):
            with torch.enable_grad():
                part = _angle_differences(leaf, teacher, start, start + anchors)
            total += part.detach()
            if part.requires_grad:
                gradient += torch.autograd.grad(part, leaf)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] * ctx.saved_tensors[0], None, None


def _angle_differences(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    """Compute the sum over the anchors from `start` to `stop`, a scalar."""
    return F.smooth_l1_loss(cosines(student, start, stop), cosines(teacher, start, stop), reduction="sum")


def cosines(vectors: Tensor, start: int, stop: int) -> Tensor:
    """Compute the cosines at anchors i = start ... stop - 1 between j and k: [B, D] to [anchors, B, B]."""
    directions = normalize_rows(vectors - vectors[start:stop, None])
    return directions @ directions.transpose(1, 2)
