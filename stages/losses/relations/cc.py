"""Correlation congruence, as in the paper and as in the reference code.

CC: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", ICCV (arXiv 1904.01802).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import PairedModule
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes, TeacherShapes
from kdpipe.stages.losses.relations.relation import Embedding, RelationLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad

GAMMA, ORDER = 0.4, 2
"""The Gaussian kernel's gamma and the order of its expansion in the paper's experiments."""


@section
class CC(RelationLoss):
    """Disagreement of embedded features between samples, summed over pairs of layers.

    Defaults are those of RepDistiller.

    Attributes:
        dim: width of the embeddings: linear layers on both sides, which train with the student.
        variant: "code", the product of the errors of samples that are adjacent in the batch, as in RepDistiller, to
            which the default weight belongs; or "paper", the squared difference of the correlations of all pairs.
    """

    paper: ClassVar[str] = "Peng et al. 2019, arXiv 1904.01802"

    loss: Literal["cc"] = "cc"
    weight: Scheduled = 0.02
    dim: Annotated[int, Field(ge=1), max_value(10**6)] = 128
    variant: Literal["code", "paper"] = "code"

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        layers, features = self.student_layers(), self.required_features(student)
        students = [Embedding(student[layer], self.dim) for layer in layers]
        teachers = [Embedding(teacher[feature], self.dim) for feature in features]
        compare = cc_loss if self.variant == "code" else correlation_loss
        pairs = [CCModule(*embeddings, compare) for embeddings in zip(students, teachers, strict=True)]
        return PairedModule(layers, features, pairs)


class CCModule(nn.Module):
    """The loss of the batch of all processes, a scalar, at one pair of layers, with the embeddings of both sides."""

    def __init__(self, student: Embedding, teacher: Embedding, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.student, self.teacher, self.compare = student, teacher, compare

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        embedded = self.student(student), self.teacher(teacher)
        return self.compare(all_gather_with_grad(embedded[0]), all_gather_with_grad(embedded[1]))


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over b < B - 1 of sum_d e_bd e_(b+1)d, with e = |student - teacher|; 0 for a batch of one.

    This, and not the paper's loss, is what RepDistiller's published results were trained with. It depends on the order
    of the batch, and is 0 already if every second sample agrees.

    Embeddings are [B, dim]. The result is a scalar in float32 or wider.

    Example:
        >>> cc_loss(torch.ones(4, 8), torch.zeros(4, 8))
        tensor(8.)
    """
    student = to_float32(student)
    errors = (student - teacher.to(student.dtype)).abs()
    return (errors[:-1] * errors[1:]).sum() / max(1, len(errors) - 1)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ||C_t - C_s||^2 / B^2 with C from `correlations`: the paper's correlation congruence.

    Embeddings are [B, D] and [B, D']. The result is a scalar in float32 or wider.

    Example:
        >>> correlation_loss(torch.eye(4), torch.ones(4, 8))
        tensor(0.1899)
    """
    student = to_float32(student)
    return (correlations(teacher.to(student.dtype)) - correlations(student)).square().mean()


def correlations(vectors: Tensor) -> Tensor:
    """Compute the Gaussian kernel exp(-gamma ||x - y||^2) of L2-normalized vectors, [B, D] to [B, B].

    It is expanded as exp(-2 gamma) sum_p (2 gamma)^p / p! (x . y)^p up to p = 2, as in the paper.
    """
    units = normalize_rows(vectors)
    products = units @ units.T
    terms = [(2 * GAMMA) ** power / math.factorial(power) * products**power for power in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * torch.stack(terms).sum(0)
