"""Similarity-preserving distillation: Tung and Mori 2019 (arXiv 1907.09682)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from stages.config import section
from stages.forms import MAP, Wanted, widened
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.relation import Relation
from stages.losses.said import Facts, Shapes, TeacherShapes
from stages.losses.unit_rows import unit_rows
from stages.schedules import Amount


@section
class SPConfig(Entry):
    """weight times the mean squared difference between the similarities of the batch's samples to each other.

    layers: pairs of (student layer, teacher layer), whole outputs, of any shapes: usually the last maps.
    """

    paper: ClassVar[str] = "Tung and Mori 2019, arXiv 1907.09682"
    per_sample: ClassVar[bool] = False

    loss: Literal["sp"]
    layers: Pairs
    weight: Amount = 3000.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return Relation(self.layers, MAP, sp_loss)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||^2 / B^2, a scalar, in float32 or wider.

    G = F F^T is [B, B], F the flattened features, each row of G then scaled to length 1.
    student, teacher: [B, ...] of any two shapes.
    """
    student = widened(student)
    return (similarities(teacher.to(student.dtype)) - similarities(student)).square().mean()


def similarities(features: Tensor) -> Tensor:
    """The products of the batch's flattened features, [B, ...] to [B, B], each row scaled to length 1."""
    flat = features.flatten(1)
    return unit_rows(flat @ flat.T)
