"""Regression of the teacher's raw logits: Ba and Caruana 2014 (arXiv 1312.6184), Kim et al. 2021 (2105.08919)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from stages.config import section
from stages.losses.entry import Response
from stages.losses.hint import hint_per_sample
from stages.losses.said import Facts, Said, Shapes, TeacherShapes


@section
class LogitMSEConfig(Response):
    """weight times the mean squared error between the raw logits of student and teacher: KD's limit at large T."""

    paper: ClassVar[str] = "Ba and Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919"
    whole_logits: ClassVar[bool] = True

    loss: Literal["logit_mse"]

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return LogitMSE()


class LogitMSE(nn.Module):
    """Each sample's squared error, the mean over the classes, [B]."""

    def forward(self, said: Said) -> Tensor:
        return logit_mse_per_sample(said.student.logits, said.teacher.logits_at(1.0))


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The mean over samples and classes of (z_s - z_t)^2; both logits [B, num_classes]. A scalar, in float32 or wider.

    Ba and Caruana take half the sum over the classes: the same but for a factor of num_classes / 2.
    """
    return logit_mse_per_sample(student_logits, teacher_logits).mean()


def logit_mse_per_sample(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`logit_mse_loss` of each sample: [B, num_classes] twice to [B]."""
    return hint_per_sample(student_logits, teacher_logits)
