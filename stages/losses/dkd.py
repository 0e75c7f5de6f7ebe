"""Decoupled distillation: the label's class against the rest, and the other classes among themselves, weighed apart.

DKD, Zhao et al. 2022 (arXiv 2203.08679).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.config import at_most, section
from stages.forms import widened
from stages.losses.entry import Response
from stages.losses.kd import kd_per_sample
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount, Moment, Temperature, amount_at


@section
class DKDConfig(Response):
    """T squared times (alpha times the divergence of label against rest, plus beta times that of the other classes).

    alpha, beta: the weights of the two. Over the first `warmup_epochs` epochs the loss comes in linearly; 0: at once.
    On ImageNet the paper takes beta 0.5 and temperature 1.
    """

    paper: ClassVar[str] = "Zhao et al. 2022, arXiv 2203.08679"
    one_label: ClassVar[bool] = True

    loss: Literal["dkd"]
    alpha: Amount = 1.0
    beta: Amount = 8.0
    temperature: Temperature = 4.0
    warmup_epochs: Annotated[int, Field(ge=0), at_most(10**6)] = 20

    def temperatures(self) -> tuple[Temperature, ...]:
        return (self.temperature,)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return DKD(self)


class DKD(nn.Module):
    """Each sample's loss times the warm-up, [B]."""

    def __init__(self, config: DKDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        temperature = amount_at(self.config.temperature, said.moment)
        parts = dkd_per_sample(
            said.student.logits,
            said.teacher.logits_at(temperature),
            said.labels,
            temperature,
            alpha=amount_at(self.config.alpha, said.moment),
            beta=amount_at(self.config.beta, said.moment),
        )
        return warm_up(self.config.warmup_epochs, said.moment) * parts


def warm_up(epochs: int, moment: Moment) -> float:
    """min((epoch + 1) / epochs, 1), as in the authors' code, whose epochs count from 1; 1 where `epochs` is 0."""
    return 1.0 if epochs == 0 else min((moment.epoch + 1) / epochs, 1.0)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """alpha * TCKD + beta * NCKD (equation 7), both times T^2, mean over the batch: a scalar in float32 or wider.

    Both logits are [B, num_classes] with num_classes of 2 or more, labels int64 [B].
    """
    return dkd_per_sample(student_logits, teacher_logits, labels, temperature, alpha=alpha, beta=beta).mean()


def dkd_per_sample(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, *, alpha: float, beta: float
) -> Tensor:
    """`dkd_loss` of each sample, [B]."""
    target = tckd_per_sample(student_logits, teacher_logits, labels, temperature)
    others = nckd_per_sample(student_logits, teacher_logits, labels, temperature)
    return alpha * target + beta * others


def tckd_per_sample(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence between the two-way distributions (label, any other class), [B]. Shapes: `dkd_loss`."""
    student = log_odds(student_logits, labels, temperature)
    teacher = log_odds(teacher_logits, labels, temperature).to(student.dtype)
    label = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    rest = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (label + rest)


def nckd_per_sample(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence between the distributions over the classes that are not the label, [B]. Shapes:
    `dkd_loss`.
    """
    return kd_per_sample(without_label(student_logits, labels), without_label(teacher_logits, labels), temperature)


def log_odds(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log(p / (1 - p)) of the label's softened probability p, in float32 or wider: [B, num_classes] to [B].

    1 - p is summed over the other classes, never taken from p: at saturated logits p is rounded to 1.
    """
    soft = widened(logits) / temperature
    return soft.gather(1, labels[:, None])[:, 0] - torch.logsumexp(without_label(soft, labels), 1)


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the classes that are not the label, in their order: [B, num_classes] to [B, num_classes - 1].

    Taking a large number off the label's logit instead, as the authors' code does, leaves it in at large logits.
    """
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, places + (places >= labels[:, None]))
