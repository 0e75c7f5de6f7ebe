"""Multi-level logit distillation: of each sample, of the classes' and of the samples' relations, at several
temperatures. Jin, Wang, Lin 2023 (CVPR, "Multi-Level Logit Distillation").
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.config import section
from stages.forms import widened
from stages.losses.entry import Response
from stages.losses.global_batch import gathered
from stages.losses.kd import kd_per_sample
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Temperature, amount_at


@section
class MLLDConfig(Response):
    """KD plus the squared errors of the classes' and of the samples' Gram matrices, summed over several temperatures.

    temperature_list: the temperatures. The Gram matrices go over the batch of all processes. The authors' code also
    multiplies by masks of the less confident half of the samples and of the classes, after the mean, so that they are
    one factor of about a half for the whole batch: left out here. Its second, strongly augmented view is the recipe's
    to ask for.
    """

    paper: ClassVar[str] = "Jin et al. 2023, CVPR"
    per_sample: ClassVar[bool] = False

    loss: Literal["mlld"]
    temperature_list: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0)

    def temperatures(self) -> tuple[Temperature, ...]:
        return self.temperature_list

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return MLLD(self)


class MLLD(nn.Module):
    """The loss of a batch, a scalar."""

    def __init__(self, config: MLLDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        temperatures = [amount_at(one, said.moment) for one in self.config.temperature_list]
        parts = [mlld_loss(said.student.logits, said.teacher.logits_at(one), one) for one in temperatures]
        return torch.stack(parts).sum()


def mlld_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`kd_loss` + `class_relation` + `batch_relation` of softmax(logits / T), at one temperature: a scalar, in float32
    or wider. Both logits are [B, num_classes]. The module sums it over its temperatures.
    """
    student = F.softmax(widened(student_logits) / temperature, 1)
    teacher = F.softmax(widened(teacher_logits).to(student.dtype) / temperature, 1)
    student, teacher = gathered(student), gathered(teacher)
    instance = gathered(kd_per_sample(student_logits, teacher_logits, temperature)).mean()
    return instance + class_relation(student, teacher) + batch_relation(student, teacher)


def class_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """|P_s^T P_s - P_t^T P_t|^2 / num_classes of two batches of probabilities P [B, num_classes], a scalar."""
    return (student.t() @ student - teacher.t() @ teacher).square().sum() / student.shape[1]


def batch_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """|P_s P_s^T - P_t P_t^T|^2 / B of two batches of probabilities P [B, num_classes], a scalar."""
    return (student @ student.t() - teacher @ teacher.t()).square().sum() / student.shape[0]
