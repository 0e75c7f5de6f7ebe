"""Distillation by correlation: across the classes of a sample, and across the samples of a class.

DIST: Huang et al. 2022, "Knowledge Distillation from a Stronger Teacher", NeurIPS (arXiv 2205.10536).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, value_at
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad

CONSTANT = 1e-12
"""Rows whose deviation is at most this share of their norm are constant but for rounding, in float64."""


MIN_PROBABILITY = 1e-100
"""A class of which no sample of the batch has more counts as constant."""


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
    two_classes: ClassVar[str] = "the correlation over the classes of a sample (beta) is 1 or -1, without a gradient"

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
    student_logits, teacher_logits = to_float32(student_logits), to_float32(teacher_logits)
    # 1 - r is a small difference of large numbers, which T^2 enlarges.
    student, teacher = (
        F.softmax(all_gather_with_grad(logits).double() / temperature, 1) for logits in (student_logits, teacher_logits)
    )
    rows = 1 - pearson(student, teacher).mean()
    columns = 1 - pearson(student.t(), teacher.t()).mean()
    return (temperature**2 * (beta * rows + gamma * columns)).to(student_logits.dtype)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Compute the correlation of each row of x [N, M] with that of y [N, M], [N]; 0, without gradient, if constant.

    The authors' code adds 1e-8 to the product of norms, as large as that product at 20,000 classes and T = 4: a student
    equal to the teacher would have r < 1.
    """
    correlations: Tensor = (_deviations(x) * _deviations(y)).sum(1)
    return correlations


def _deviations(rows: Tensor) -> Tensor:
    """Return each row of probabilities minus its mean, with L2 norm 1; zeros for constant rows."""
    rows = rows / rows.detach().amax(1, keepdim=True).clamp_min(MIN_PROBABILITY)  # their squares may underflow
    centered = rows - rows.mean(1, keepdim=True)
    squares = centered.square().sum(1, keepdim=True)
    is_constant = squares <= CONSTANT**2 * rows.square().sum(1, keepdim=True).clamp_min(1)
    return torch.where(is_constant, 0.0, centered * squares.masked_fill(is_constant, 1.0).rsqrt())
