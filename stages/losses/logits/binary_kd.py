"""Distillation of independent labels: each label's probability on its own.

Yang et al. 2023, "Multi-Label Knowledge Distillation", ICCV (arXiv 2308.06453), its logits part, MLD.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.data.measures import binary_kl
from kdpipe.stages.data.tasks import MULTILABEL, Task
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at
from kdpipe.stages.numerics import soften, to_float32


@section
class BinaryKD(SoftLogitLoss):
    """weight * T^2 * KL divergence from the teacher's sigmoids, the mean over the labels.

    As torch's binary cross entropy it is a mean; the paper's sum, at T = 1, is larger by the number of labels.

    Attributes:
        temperature: T of both sigmoids.
    """

    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2308.06453"
    tasks: ClassVar[tuple[Task, ...]] = (MULTILABEL,)
    min_classes: ClassVar[int] = 1
    whole_logits: ClassVar[bool] = True

    loss: Literal["binary_kd"] = "binary_kd"
    weight: Scheduled = 1.0
    temperature: Temperature = 1.0

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature = value_at(self.temperature, inputs.progress)
        return binary_kd_loss(inputs.student.logits, inputs.teacher.logits_at(temperature), temperature)


def binary_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T^2 * the mean over labels of KL(sigmoid(t / T) || sigmoid(s / T)) of each sample, [B], in nats.

    Both logits are [B, K]. The result is float32 or wider.

    Example:
        >>> binary_kd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.3808])
    """
    student, teacher = soften(student_logits, temperature), soften(teacher_logits, temperature)
    losses = temperature**2 * binary_kl(teacher.to(student.dtype), student).mean(1)
    return losses.to(to_float32(student_logits).dtype)
