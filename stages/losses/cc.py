"""Correlation congruence: Peng et al. 2019 (arXiv 1904.01802), and what the field's reference code has in its place."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.config import at_most, section
from stages.forms import POOLED, Wanted, widened
from stages.losses.embedding import Embedding
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.global_batch import gathered
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.losses.unit_rows import unit_rows
from stages.schedules import Amount

GAMMA, ORDER = 0.4, 2
"""Of the Gaussian kernel, and of its expansion: those of the paper's experiments."""


@section
class CCConfig(Entry):
    """weight times the disagreement of embedded features between samples: of batch neighbours, or of all pairs.

    layers: pairs of (student layer, teacher layer), maps by their means: usually the last before the classifier.
    dim: what both sides are embedded in, by linear layers that train with the student. variant: "code", the product of
    the errors of samples that follow each other in the batch (`cc_loss`), to which the weight belongs; or "paper", the
    difference of the correlations of all pairs (`correlation_loss`).
    """

    paper: ClassVar[str] = "Peng et al. 2019, arXiv 1904.01802"
    per_sample: ClassVar[bool] = False

    loss: Literal["cc"]
    layers: Pairs
    weight: Amount = 0.02
    dim: Annotated[int, Field(ge=1), at_most(10**6)] = 128
    variant: Literal["code", "paper"] = "code"

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers, POOLED)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return CC(self, student, teacher)


class CC(nn.Module):
    """The loss of the global batch, summed over the pairs of layers, a scalar, through embeddings of both sides."""

    def __init__(self, config: CCConfig, student: Shapes, teacher: TeacherShapes) -> None:
        super().__init__()
        self.pairs = config.layers
        self.loss = cc_loss if config.variant == "code" else correlation_loss
        self.students = nn.ModuleList(Embedding(student[mine], config.dim) for mine, _ in self.pairs)
        self.teachers = nn.ModuleList(
            Embedding(teacher[Wanted(theirs, POOLED)], config.dim) for _, theirs in self.pairs
        )

    def forward(self, said: Said) -> Tensor:
        parts = []
        for number, (mine, theirs) in enumerate(self.pairs):
            of_student = self.students[number](said.student.features[mine])
            of_teacher = self.teachers[number](said.teacher.features[Wanted(theirs, POOLED)])
            parts.append(self.loss(gathered(of_student), gathered(of_teacher)))
        return torch.stack(parts).sum()


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over b < B - 1 of sum_d e_bd e_(b+1)d, with e = |student - teacher|; a scalar, 0 for a batch of one.

    student, teacher: [B, dim], embedded. This, and not the paper's loss, is behind the published results of the
    reference code. It depends on the order of the batch, and is 0 already where every second sample agrees.
    """
    student = widened(student)
    apart = (student - teacher.to(student.dtype)).abs()
    return (apart[:-1] * apart[1:]).sum() / max(1, len(apart) - 1)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||C_t - C_s||^2 / B^2, the paper's correlation congruence; C being `correlations`. A scalar.

    student, teacher: [B, dim], embedded; of any two widths.
    """
    student = widened(student)
    return (correlations(teacher.to(student.dtype)) - correlations(student)).square().mean()


def correlations(vectors: Tensor) -> Tensor:
    """The Gaussian kernel exp(-gamma ||x - y||^2) of vectors [B, D] scaled to length 1, to [B, B].

    By its expansion exp(-2 gamma) sum_p (2 gamma)^p / p! (x . y)^p to the order p = 2, as in the paper.
    """
    units = unit_rows(vectors)
    products = units @ units.T
    terms = [(2 * GAMMA) ** power / math.factorial(power) * products**power for power in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * torch.stack(terms).sum(0)
