"""Distillation by correlation: across the classes of a sample, and across the samples of a class.

DIST: Huang et al. 2022, "Knowledge Distillation from a Stronger Teacher", NeurIPS (arXiv 2205.10536).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, value_at
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad

EPS = 1e-8
"""Added to the product of norms: the correlation with a constant row is 0."""


@section
class DIST(SoftLogitLoss):
    """T^2 * (beta * (1 - Pearson's r over the classes) + gamma * (1 - r over the batch)).

    r is that of the probabilities softmax(logits / T); over the batch it is taken for each class, on the batch of all
    processes. Defaults are those of the authors' code for CIFAR-100; on ImageNet they use T = 1.

    Attributes:
        beta: weight of the correlation over the classes of a sample.
        gamma: weight of the correlation over the samples of a class.
    """

    paper: ClassVar[str] = "Huang et al. 2022, arXiv 2205.10536"
    per_sample: ClassVar[bool] = False

    loss: Literal["dist"] = "dist"
    weight: Scheduled = 2.0
    beta: Scheduled = 1.0
    gamma: Scheduled = 1.0

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature = value_at(self.temperature, inputs.progress)
        return dist_loss(
            inputs.student.logits,
            inputs.teacher.logits_at(temperature),
            temperature,
            beta=value_at(self.beta, inputs.progress),
            gamma=value_at(self.gamma, inputs.progress),
        )


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, *, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Compute T^2 * (beta * mean over samples of (1 - r of rows) + gamma * mean over classes of (1 - r of columns)).

    r is Pearson's correlation of softmax(logits / T), on the rows of all processes. In a batch of one the columns have
    r = 0 and no gradient.

    Both logits are [B, num_classes]. The result is a scalar in float32 or wider.

    Example:
        >>> dist_loss(torch.eye(3), torch.eye(3).flip(0), beta=1.0, gamma=2.0)
        tensor(48.)
    """
    student = F.softmax(to_float32(student_logits) / temperature, 1)
    teacher = F.softmax(to_float32(teacher_logits).to(student.dtype) / temperature, 1)
    student, teacher = all_gather_with_grad(student), all_gather_with_grad(teacher)
    rows = 1 - pearson(student, teacher).mean()
    columns = 1 - pearson(student.t(), teacher.t()).mean()
    return temperature**2 * (beta * rows + gamma * columns)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Compute the correlation of each row of x [N, M] with that of y [N, M], [N]; 0 for constant rows."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    correlations: Tensor = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + EPS)
    return correlations
