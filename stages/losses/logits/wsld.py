"""Weighted soft labels: less of the teacher where the student is as good as the teacher.

WSLD: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR
(arXiv 2102.00650).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at
from kdpipe.stages.numerics import soften, to_float32

EPS = 1e-7
"""Added to the teacher's cross entropy, as in the authors' code."""


@section
class WSLD(SoftLogitLoss):
    """T^2 * cross entropy with the teacher's softened probabilities, weighted by sample.

    The weight is 1 - exp(-l_s / l_t), where l are the cross entropies of student and teacher with the label: small
    where the student is already better than the teacher. Defaults are those of the authors' code for ImageNet.
    """

    paper: ClassVar[str] = "Zhou et al. 2021, arXiv 2102.00650"
    one_label: ClassVar[bool] = True

    loss: Literal["wsld"] = "wsld"
    weight: Scheduled = 2.5
    temperature: Temperature = 2.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0, self.temperature)

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature, logits, teacher = (
            value_at(self.temperature, inputs.progress),
            inputs.student.logits,
            inputs.teacher,
        )
        weights = sample_weights(logits, teacher.logits_at(1.0), inputs.labels)
        return weights * soft_cross_entropy(logits, teacher.logits_at(temperature), temperature)


def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute -w T^2 * sum over classes of p_t log p_s of each sample, [B], with p = softmax(logits / T).

    w = 1 - exp(-l_s / l_t), without gradient, of the cross entropies l with the labels at T = 1.

    Both logits are [B, num_classes], labels int64 [B]. The result is float32 or wider.

    Example:
        >>> wsld_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), labels=torch.tensor([0]))
        tensor([0.2420])
    """
    weights = sample_weights(student_logits, teacher_logits, labels)
    return weights * soft_cross_entropy(student_logits, teacher_logits, temperature)


def sample_weights(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute 1 - exp(-l_s / l_t) of each sample, [B]. Shapes as in `wsld_loss`."""
    student, teacher = (
        F.cross_entropy(to_float32(logits.detach()), labels, reduction="none")
        for logits in (student_logits, teacher_logits)
    )
    return 1 - (-student / (teacher.to(student.dtype) + EPS)).exp()


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute -T^2 * sum over classes of p_t log p_s of each sample, [B]. Shapes as in `wsld_loss`."""
    log_student = F.log_softmax(soften(student_logits, temperature), 1)
    teacher = F.softmax(soften(teacher_logits, temperature).to(log_student.dtype), 1)
    return (-(temperature**2) * (teacher * log_student).sum(1)).to(to_float32(student_logits).dtype)
