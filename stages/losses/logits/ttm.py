"""Transformed teacher matching: the teacher's probabilities raised to a power, and the student at temperature 1.

TTM and WTTM: Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR
(arXiv 2402.11148).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.losses.base import LogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, Temperature
from kdpipe.stages.numerics import to_float32

Exponent = Annotated[float, Field(ge=0.001, le=100)]


@section
class TTM(LogitLoss):
    """KL divergence of the student's probabilities, at T = 1, from the teacher's raised to `exponent` and normalized.

    These are the teacher's at T = 1 / exponent: KD without the student's temperature and without the factor T^2.
    Defaults are those of the authors' code for CIFAR-100.

    Attributes:
        exponent: gamma, to which the teacher's probabilities are raised.
    """

    paper: ClassVar[str] = "Zheng & Yang 2024, arXiv 2402.11148"
    min_classes: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION,)

    loss: Literal["ttm"] = "ttm"
    weight: Scheduled = 45.0
    exponent: Exponent = 0.1

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1 / self.exponent,)

    def compute(self, inputs: LossInputs) -> Tensor:
        return ttm_loss(inputs.student.logits, inputs.teacher.logits_at(1 / self.exponent), self.exponent)


@section
class WTTM(TTM):
    """As `ttm`, where each sample has the weight sum over classes of p_t^exponent: the more, the less sure the teacher.

    Defaults are those of the authors' code for CIFAR-100.
    """

    loss: Literal["wttm"] = "wttm"  # type: ignore[assignment]
    weight: Scheduled = 4.0
    exponent: Exponent = 0.2

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0, 1 / self.exponent)

    def compute(self, inputs: LossInputs) -> Tensor:
        return power_sum(inputs.teacher.logits_at(1.0), self.exponent) * super().compute(inputs)


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.1) -> Tensor:
    """Compute sum over classes of q log(q / p_s) of each sample, [B], with q = p_t^exponent / sum of p_t^exponent.

    p are the softmax of the logits [B, num_classes]. The result is float32 or wider.

    Example:
        >>> ttm_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), exponent=0.5)
        tensor([1.0068])
    """
    student = to_float32(student_logits)
    log_teacher = F.log_softmax(exponent * to_float32(teacher_logits).to(student.dtype), 1)
    return F.kl_div(F.log_softmax(student, 1), log_teacher, reduction="none", log_target=True).sum(1)


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.2) -> Tensor:
    """Compute `ttm_loss` times the sum over classes of p_t^exponent, [B].

    Example:
        >>> wttm_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), exponent=0.5)
        tensor([1.2925])
    """
    return power_sum(teacher_logits, exponent) * ttm_loss(student_logits, teacher_logits, exponent)


def power_sum(logits: Tensor, exponent: float) -> Tensor:
    """Compute the sum over classes of softmax(logits)^exponent of each sample, [B], in float32 or wider."""
    return (exponent * F.log_softmax(to_float32(logits), 1)).exp().sum(1)
