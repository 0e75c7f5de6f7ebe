"""Knowledge distillation by softened logits: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stages.config import section


@section
class KDConfig:
    """weight (alpha) times T squared times the divergence from the teacher's softened distribution."""

    loss: Literal["kd"]
    weight: Annotated[float, Field(ge=0)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 4.0


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * sum over classes of p_t log(p_t / p_s), mean over the batch, with p = softmax(logits / T).

    Both logits are [B, num_classes]; the result is a scalar, in float32 or wider. The factor T^2 keeps the
    gradient's size independent of T (section 2.1 of the paper).
    """
    log_student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _wide(logits: Tensor) -> Tensor:
    """float32 at the least: half precision loses the tail of the softmax."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()
