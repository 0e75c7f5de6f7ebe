"""Knowledge distillation by softened logits: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import section
from stages.forms import widened
from stages.losses.entry import Response
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount, Temperature, amount_at


@section
class KDConfig(Response):
    """weight (alpha) times T squared times the divergence from the teacher's softened distribution."""

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"

    loss: Literal["kd"]
    weight: Amount = 0.9
    temperature: Temperature = 4.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (self.temperature,)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return KD(self)


class KD(nn.Module):
    """T^2 times each sample's divergence, [B]."""

    def __init__(self, config: KDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        temperature = amount_at(self.config.temperature, said.moment)
        return kd_per_sample(said.student.logits, said.teacher.logits_at(temperature), temperature)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * sum over classes of p_t log(p_t / p_s), mean over the batch, with p = softmax(logits / T).

    Both logits are [B, num_classes]; the result is a scalar, in float32 or wider. The factor T^2 keeps the
    gradient's size independent of T (section 2.1 of the paper).
    """
    return kd_per_sample(student_logits, teacher_logits, temperature).mean()


def kd_per_sample(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`kd_loss` of each sample: [B, num_classes] twice to [B]."""
    log_student = F.log_softmax(widened(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(widened(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
