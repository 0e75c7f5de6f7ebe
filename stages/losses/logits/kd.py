"""Knowledge distillation with softened logits.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", NIPS workshop (arXiv 1503.02531).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import LogitLossConfig
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at
from kdpipe.stages.numerics import to_float32


@section
class KDConfig(LogitLossConfig):
    """weight (alpha) * T^2 * KL divergence from the teacher's softened class probabilities.

    Defaults are those of RepDistiller for CIFAR-100; on ImageNet T = 1 and weight 0.5 are usual.

    Attributes:
        temperature: T of both softmaxes.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"

    loss: Literal["kd"]
    weight: Scheduled = 0.9
    temperature: Temperature = 4.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (self.temperature,)

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature = value_at(self.temperature, inputs.progress)
        return kd_per_sample(inputs.student.logits, inputs.teacher.logits_at(temperature), temperature)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 * sum over classes of p_t log(p_t / p_s), averaged over the batch, with p = softmax(logits / T).

    The factor T^2 keeps the size of the gradient independent of T (section 2.1 of the paper).

    Both logits are [B, num_classes]. The result is a scalar in float32 or wider.
    """
    return kd_per_sample(student_logits, teacher_logits, temperature).mean()


def kd_per_sample(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute `kd_loss` of each sample, [B]."""
    log_student = F.log_softmax(to_float32(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(to_float32(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
