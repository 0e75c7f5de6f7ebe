"""Probabilistic knowledge transfer: Passalis and Tefas 2018 (arXiv 1803.10837)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stages.config import section
from stages.forms import POOLED, Wanted, widened
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.relation import Relation
from stages.losses.said import Facts, Shapes, TeacherShapes
from stages.schedules import Amount

EPS = 1e-7


@section
class PKTConfig(Entry):
    """weight times the divergence between the probabilities with which a sample has the others as its neighbours.

    layers: pairs of (student layer, teacher layer), maps by their means: usually the last before the classifier.
    """

    paper: ClassVar[str] = "Passalis and Tefas 2018, arXiv 1803.10837"
    per_sample: ClassVar[bool] = False

    loss: Literal["pkt"]
    layers: Pairs
    weight: Amount = 30000.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers, POOLED)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return Relation(self.layers, POOLED, pkt_loss)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over B^2 of p_t log((p_t + eps) / (p_s + eps)), p being `neighbours`; a scalar, in float32 or wider.

    As in the field's reference code a sample is one of its own neighbours. student [B, D], teacher [B, D'].
    """
    student = widened(student)
    of_student, of_teacher = neighbours(student), neighbours(teacher.to(student.dtype))
    return (of_teacher * ((of_teacher + EPS) / (of_student + EPS)).log()).mean()


def neighbours(vectors: Tensor) -> Tensor:
    """(cosine + 1) / 2 of the batch's vectors, [B, D] to [B, B], each row divided by its sum.

    The cosine with a zero vector is 0, and its gradient is 0.
    """
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    units = (vectors / (norms + EPS)).masked_fill(norms == 0, 0.0)
    kernel = (units @ units.T + 1) / 2
    probabilities: Tensor = kernel / kernel.sum(1, keepdim=True)
    return probabilities
