"""Decoupled knowledge distillation: the label against all other classes, and the other classes among themselves.

DKD: Zhao et al. 2022, "Decoupled Knowledge Distillation", CVPR (arXiv 2203.08679).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.losses.schedules import Scheduled, value_at, warmup_factor
from kdpipe.stages.numerics import soften, to_float32


@section
class DKD(SoftLogitLoss):
    """T^2 * (alpha * KL of label against the rest + beta * KL among the other classes).

    Defaults are those of the authors' code (mdistiller) for CIFAR-100; on ImageNet the paper uses beta 0.5 and T = 1.

    Attributes:
        alpha: weight of the divergence between label and rest (TCKD).
        beta: weight of the divergence among the other classes (NCKD).
        warmup_epochs: epochs over which the loss grows linearly to its full value; 0 for no warm-up.
    """

    paper: ClassVar[str] = "Zhao et al. 2022, arXiv 2203.08679"
    one_label: ClassVar[bool] = True
    two_classes: ClassVar[str] = "the divergence among the other classes (beta) is 0"

    loss: Literal["dkd"] = "dkd"
    alpha: Scheduled = 1.0
    beta: Scheduled = 8.0
    warmup_epochs: Annotated[int, Field(ge=0), max_value(10**6)] = 20

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature = value_at(self.temperature, inputs.progress)
        losses = dkd_loss(
            inputs.student.logits,
            inputs.teacher.logits_at(temperature),
            inputs.labels,
            temperature,
            alpha=value_at(self.alpha, inputs.progress),
            beta=value_at(self.beta, inputs.progress),
        )
        return warmup_factor(self.warmup_epochs, inputs.progress) * losses


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Compute alpha * TCKD + beta * NCKD (equation 7), both times T^2, of each sample, [B].

    Both logits are [B, num_classes], num_classes >= 2, labels int64 [B]. The result is float32 or wider.

    Example:
        >>> dkd_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]), labels=torch.tensor([1]))
        tensor([5.0100])
    """
    target = tckd_loss(student_logits, teacher_logits, labels, temperature)
    return alpha * target + beta * nckd_loss(student_logits, teacher_logits, labels, temperature)


def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute T^2 * KL between the binary distributions (label, any other class), [B]. Shapes as in `dkd_loss`."""
    student = log_odds(student_logits, labels, temperature)
    teacher = log_odds(teacher_logits, labels, temperature).to(student.dtype)
    label = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    rest = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (temperature**2 * (label + rest)).to(to_float32(student_logits).dtype)


def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute T^2 * KL between the distributions over all classes but the label, [B]. Shapes as in `dkd_loss`."""
    return kd_loss(without_label(student_logits, labels), without_label(teacher_logits, labels), temperature)


def log_odds(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute log(p / (1 - p)) of the label's softened probability p, [B], from `soften`.

    1 - p is summed over the other classes, not computed from p, which rounds to 1 at saturated logits.

    Logits are [B, num_classes], labels int64 [B].
    """
    soft = soften(logits, temperature)
    return soft.gather(1, labels[:, None])[:, 0] - torch.logsumexp(without_label(soft, labels), 1)


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Remove each row's label from the logits, keeping the order: [B, num_classes] to [B, num_classes - 1].

    Subtracting a large number from the label's logit, as the authors' code does, fails at large logits.
    """
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= labels[:, None]))
