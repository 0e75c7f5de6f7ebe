"""Knowledge distillation with softened logits, and its limit at high temperature, the regression of raw logits.

KD: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", NIPS workshop (arXiv 1503.02531).
Logit MSE: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", NeurIPS (arXiv 1312.6184); Kim et al. 2021,
"Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI (arXiv 2105.08919).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import LogitLoss, SoftLogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, value_at
from kdpipe.stages.numerics import soften, to_float32


@section
class KD(SoftLogitLoss):
    """weight (alpha) * T^2 * KL divergence from the teacher's softened class probabilities.

    Defaults are those of RepDistiller for CIFAR-100; on ImageNet T = 1 and weight 0.5 are usual.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"
    linear: ClassVar[bool] = True

    loss: Literal["kd"] = "kd"
    weight: Scheduled = 0.9

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature = value_at(self.temperature, inputs.progress)
        return kd_loss(inputs.student.logits, inputs.teacher.logits_at(temperature), temperature)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute T^2 * sum over classes of p_t log(p_t / p_s) of each sample, [B], with p = softmax(logits / T).

    The factor T^2 keeps the size of the gradient independent of T (section 2.1 of the paper).

    Both logits are [B, num_classes]. The result is float32 or wider.

    Example:
        >>> kd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=4.0)
        tensor([1.9593])
    """
    log_student = F.log_softmax(soften(student_logits, temperature), dim=1)
    log_teacher = F.log_softmax(soften(teacher_logits, temperature), dim=1)
    losses = temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return losses.to(to_float32(student_logits).dtype)


@section
class LogitMSE(LogitLoss):
    """Mean squared error between the raw logits of student and teacher: the limit of KD at large T.

    The mean is over samples and classes; Ba and Caruana use half the sum over the classes, larger by num_classes / 2.
    """

    paper: ClassVar[str] = "Ba and Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919"
    requires: ClassVar[str] = "logits of all classes"
    whole_logits: ClassVar[bool] = True

    loss: Literal["logit_mse"] = "logit_mse"

    def compute(self, inputs: LossInputs) -> Tensor:
        return logit_mse_loss(inputs.student.logits, inputs.teacher.logits_at(1.0))


def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the mean over classes of the squared error of each sample, [B], from logits [B, num_classes].

    Example:
        >>> logit_mse_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([4.])
    """
    student = to_float32(student_logits)
    return F.mse_loss(student, teacher_logits.to(student.dtype), reduction="none").mean(1)
