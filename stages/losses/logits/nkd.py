"""Normalized knowledge distillation: the label's soft target, and the other classes normalized to sum to 1.

NKD: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation", ICCV (arXiv 2303.13005).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.logits.dkd import without_label
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at
from kdpipe.stages.numerics import soften, to_float32


@section
class NKD(SoftLogitLoss):
    """Cross entropy of the label, times the teacher's probability, + gamma * T^2 * that of the other classes.

    Defaults are those of the authors' code for ImageNet.

    Attributes:
        gamma: weight of the other classes.
        temperature: T of the other classes; the label's probability always has T = 1.
    """

    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2303.13005"
    one_label: ClassVar[bool] = True
    two_classes: ClassVar[str] = "the cross entropy among the other classes (gamma) is 0"

    loss: Literal["nkd"] = "nkd"
    gamma: Scheduled = 1.5
    temperature: Temperature = 1.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0, self.temperature)

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature, gamma = value_at(self.temperature, inputs.progress), value_at(self.gamma, inputs.progress)
        logits, teacher, labels = inputs.student.logits, inputs.teacher, inputs.labels
        target = target_loss(logits, teacher.logits_at(1.0), labels)
        return target + gamma * non_target_loss(logits, teacher.logits_at(temperature), labels, temperature)


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, *, gamma: float = 1.5
) -> Tensor:
    """Compute -p_t^y log p_s^y - gamma T^2 * sum over i != y of q_t^i log q_s^i of each sample, [B].

    y is the label, p = softmax(logits), q = softmax(logits / T) over the classes other than y. As a cross entropy it is
    not 0 where student and teacher agree.

    Both logits are [B, num_classes], num_classes >= 2, labels int64 [B]. The result is float32 or wider.

    Example:
        >>> nkd_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]), labels=torch.tensor([1]))
        tensor([3.1681])
    """
    target = target_loss(student_logits, teacher_logits, labels)
    return target + gamma * non_target_loss(student_logits, teacher_logits, labels, temperature)


def target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -p_t^y log p_s^y of each sample, [B]. Shapes as in `nkd_loss`."""
    log_student = F.log_softmax(to_float32(student_logits), 1)
    teacher = F.softmax(to_float32(teacher_logits).to(log_student.dtype), 1)
    return -(teacher * log_student).gather(1, labels[:, None])[:, 0]


def non_target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute -T^2 * sum over i != y of q_t^i log q_s^i of each sample, [B]. Shapes as in `nkd_loss`."""
    log_student = F.log_softmax(soften(without_label(student_logits, labels), temperature), 1)
    teacher = F.softmax(soften(without_label(teacher_logits, labels), temperature).to(log_student.dtype), 1)
    return (-(temperature**2) * (teacher * log_student).sum(1)).to(to_float32(student_logits).dtype)
