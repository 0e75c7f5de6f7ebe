"""Relational knowledge distillation: Park, Kim, Lu, Cho 2019 (arXiv 1904.05068)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.config import at_most, section
from stages.forms import POOLED, Wanted, widened
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.relation import Relation
from stages.losses.said import Facts, Shapes, TeacherShapes
from stages.losses.unit_rows import unit_rows
from stages.schedules import Amount

MOST_COSINES = 2**22
"""How many elements a tensor of cosines, or of the differences that they are of, may have: 16 MiB in float32. Where the
triplets have more they are computed in blocks, with their gradient; a block has one anchor at the least.
"""

EPS = 1e-12
"""The least squared distance of two samples; below it there is no gradient."""


@section
class RKDConfig(Entry):
    """weight times the differences of distances and angles between the batch's samples, each by its own weight.

    layers: pairs of (student layer, teacher layer), maps by their means: usually the last before the classifier.
    distance_weight: of the distances of pairs. angle_weight: of the angles of triplets, whose cost grows with the cube
    of the batch.
    """

    paper: ClassVar[str] = "Park et al. 2019, arXiv 1904.05068"
    per_sample: ClassVar[bool] = False

    loss: Literal["rkd"]
    layers: Pairs
    weight: Amount = 1.0
    distance_weight: Annotated[float, Field(ge=0), at_most(10**9)] = 25.0
    angle_weight: Annotated[float, Field(ge=0), at_most(10**9)] = 50.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers, POOLED)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        loss = partial(rkd_loss, distance_weight=self.distance_weight, angle_weight=self.angle_weight)
        return Relation(self.layers, POOLED, loss)


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """distance_weight times `distance_loss` plus angle_weight times `angle_loss`; a scalar, in float32 or wider.

    student [B, D], teacher [B, D']. 0 for a batch of one, which has no relations.
    """
    student = widened(student)
    teacher = teacher.to(student.dtype)
    loss = student.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * distance_loss(student, teacher)
    if angle_weight:
        loss = loss + angle_weight * angle_loss(student, teacher)
    return loss


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber loss (delta 1) between `relative_distances`, mean over B^2; a scalar."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def relative_distances(vectors: Tensor) -> Tensor:
    """The Euclidean distances of the batch's vectors, [B, D] to [B, B], divided by the mean of those of two samples."""
    num = len(vectors)
    centred = vectors - vectors.mean(0)  # the same distances, but nothing is lost where the mean is far from 0
    squares = centred.square().sum(1)
    apart = squares[:, None] + squares - 2 * centred @ centred.T
    itself = torch.eye(num, dtype=torch.bool, device=vectors.device)
    distances = apart.clamp_min(EPS).sqrt().masked_fill(itself, 0.0)
    mean = distances.sum() / max(1, num * (num - 1))
    return distances / mean.clamp_min(EPS)


def angle_loss(student: Tensor, teacher: Tensor, most_cosines: int = MOST_COSINES) -> Tensor:
    """The Huber loss (delta 1) between the cosines of the angles at i of all triplets (i, j, k), mean over B^3;
    a scalar. Triplets in which i is j or k have a cosine of 0.

    In blocks of anchors i with `most_cosines` each, the result being the same but for the order in which it is summed.
    """
    num, width = len(student), max(student.shape[1], teacher.shape[1])
    anchors = max(1, most_cosines // (num * max(num, width)))
    if anchors >= num:
        return _angles_apart(student, teacher, 0, num) / num**3
    total: Tensor = _InBlocks.apply(student, teacher, anchors)
    return total / num**3


class _InBlocks(torch.autograd.Function):
    """The sum over all anchors, with its gradient by the student found block by block, so that nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, anchors: int) -> Tensor:
        leaf = student.detach().requires_grad_(ctx.needs_input_grad[0])
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        for at in range(0, len(student), anchors):
            with torch.enable_grad():
                part = _angles_apart(leaf, teacher, at, at + anchors)
            total += part.detach()
            if part.requires_grad:
                gradient += torch.autograd.grad(part, leaf)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] * ctx.saved_tensors[0], None, None


def _angles_apart(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    """The sum over the anchors from `start` to `stop`, a scalar."""
    return F.smooth_l1_loss(cosines(student, start, stop), cosines(teacher, start, stop), reduction="sum")


def cosines(vectors: Tensor, start: int, stop: int) -> Tensor:
    """Of the angles at anchors i = start ... stop - 1 between j and k: [B, D] to [anchors, B, B]."""
    directions = unit_rows(vectors - vectors[start:stop, None])
    return directions @ directions.transpose(1, 2)
