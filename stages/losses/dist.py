"""Distillation by correlation: of a sample's classes, and of a class's samples.

DIST, Huang et al. 2022 (arXiv 2205.10536).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import section
from stages.forms import widened
from stages.losses.entry import Response
from stages.losses.global_batch import gathered
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount, Temperature, amount_at

EPS = 1e-8
"""Added to a product of lengths: where there is nothing to correlate the correlation is 0."""


@section
class DISTConfig(Response):
    """T squared times (beta times 1 - Pearson's r over the classes, plus gamma times 1 - r over the batch).

    beta, gamma: the weights of the two. Probabilities are softmax(logits / T); r over the batch is that of each class,
    over the batch of all processes. On ImageNet the authors take temperature 1.
    """

    paper: ClassVar[str] = "Huang et al. 2022, arXiv 2205.10536"
    per_sample: ClassVar[bool] = False

    loss: Literal["dist"]
    weight: Amount = 2.0
    beta: Amount = 1.0
    gamma: Amount = 1.0
    temperature: Temperature = 4.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (self.temperature,)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return DIST(self)


class DIST(nn.Module):
    """The loss of a batch, a scalar."""

    def __init__(self, config: DISTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        temperature = amount_at(self.config.temperature, said.moment)
        return dist_loss(
            said.student.logits,
            said.teacher.logits_at(temperature),
            temperature,
            beta=amount_at(self.config.beta, said.moment),
            gamma=amount_at(self.config.gamma, said.moment),
        )


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """T^2 * (beta * mean over samples of (1 - r of the rows) + gamma * mean over classes of (1 - r of the columns)).

    r is Pearson's correlation of softmax(logits / T); both logits are [B, num_classes], of which the rows of all
    processes are taken together. A scalar, in float32 or wider. A batch of one has no columns to correlate: r is
    0 there, and gives no gradient.
    """
    student = F.softmax(widened(student_logits) / temperature, 1)
    teacher = F.softmax(widened(teacher_logits).to(student.dtype) / temperature, 1)
    student, teacher = gathered(student), gathered(teacher)
    rows = 1 - pearson(student, teacher).mean()
    columns = 1 - pearson(student.t(), teacher.t()).mean()
    return temperature**2 * (beta * rows + gamma * columns)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of each row of x with that of y: [N, M] twice to [N]; 0 for rows that do not vary."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    correlations: Tensor = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + EPS)
    return correlations
