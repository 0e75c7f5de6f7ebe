"""Normalised distillation: the soft label of the label's class, and the other classes' made to sum to 1.

NKD, Yang et al. 2023 (arXiv 2303.13005).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import section
from stages.forms import widened
from stages.losses.dkd import without_label
from stages.losses.entry import Response
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount, Temperature, amount_at


@section
class NKDConfig(Response):
    """Cross entropy of the label weighed by the teacher's belief, plus gamma T squared times that of the other classes.

    gamma: the weight of the other classes. temperature: theirs; the label's class is always taken at 1.
    """

    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2303.13005"
    one_label: ClassVar[bool] = True

    loss: Literal["nkd"]
    gamma: Amount = 1.5
    temperature: Temperature = 1.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0, self.temperature)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return NKD(self)


class NKD(nn.Module):
    """Each sample's loss, [B]."""

    def __init__(self, config: NKDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        temperature = amount_at(self.config.temperature, said.moment)
        gamma = amount_at(self.config.gamma, said.moment)
        logits, teacher, labels = said.student.logits, said.teacher, said.labels
        target = target_per_sample(logits, teacher.logits_at(1.0), labels)
        return target + gamma * others_per_sample(logits, teacher.logits_at(temperature), labels, temperature)


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, *, gamma: float = 1.5
) -> Tensor:
    """-p_t^y log p_s^y - gamma T^2 * sum over i != y of q_t^i log q_s^i, mean over the batch: a scalar, in float32 or
    wider.

    y is the label, p = softmax(logits), q = softmax(logits / T) over the classes other than y. Both logits are
    [B, num_classes] with num_classes of 2 or more, labels int64 [B]. Cross entropies: not 0 where the two agree.
    """
    target = target_per_sample(student_logits, teacher_logits, labels)
    return (target + gamma * others_per_sample(student_logits, teacher_logits, labels, temperature)).mean()


def target_per_sample(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-p_t^y log p_s^y of each sample, [B]. Shapes: `nkd_loss`."""
    log_student = F.log_softmax(widened(student_logits), 1)
    teacher = F.softmax(widened(teacher_logits).to(log_student.dtype), 1)
    return -(teacher * log_student).gather(1, labels[:, None])[:, 0]


def others_per_sample(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """-T^2 * sum over i != y of q_t^i log q_s^i of each sample, [B]. Shapes: `nkd_loss`."""
    log_student = F.log_softmax(widened(without_label(student_logits, labels)) / temperature, 1)
    others = widened(without_label(teacher_logits, labels)).to(log_student.dtype)
    return -(temperature**2) * (F.softmax(others / temperature, 1) * log_student).sum(1)
