"""Decoupled KL divergence with weights of each label's classes: squared differences of logits, and cross entropy.

GKL: Cui et al. 2025, "Generalized Kullback-Leibler Divergence Loss" (arXiv 2503.08038), of which DKL and IKL (Cui et
al. 2024, "Decoupled Kullback-Leibler Divergence Loss", NeurIPS, arXiv 2305.13948) are earlier forms.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import LogitLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at, warmup_factor
from kdpipe.stages.numerics import soften, to_float32
from kdpipe.stages.runtime.collectives import all_gather_row, all_gather_with_grad


@section
class GKL(LogitLoss):
    """beta * weighted squared differences of all pairs of classes + alpha * cross entropy of softened logits.

    A pair (i, j) of a sample's classes has the weight (w_i w_j)^gamma, where w is the mean of the teacher's
    probabilities over the samples of the same label in the epoch before (all equal in the first). Defaults are those of
    the authors' code for a ResNet-8x4 on CIFAR-100.

    Attributes:
        alpha: weight of the cross entropy.
        beta: weight of the squared differences.
        gamma: power of the weights; with 0 all pairs of classes count alike.
        temperature: T of the cross entropy.
        weight_temperature: temperature of the probabilities that the weights are means of.
        warmup_epochs: epochs over which the loss grows linearly to its full value; 0 for no warm-up.
    """

    paper: ClassVar[str] = "Cui et al. 2025, arXiv 2503.08038"
    requires: ClassVar[str] = "logits of all classes"
    one_label: ClassVar[bool] = True
    per_sample: ClassVar[bool] = False
    whole_logits: ClassVar[bool] = True
    min_classes: ClassVar[int] = 2
    tasks: ClassVar[tuple[Literal["classification"], ...]] = ("classification",)

    loss: Literal["gkl"] = "gkl"
    alpha: Scheduled = 1.0
    beta: Scheduled = 16.0
    gamma: Annotated[float, Field(ge=0, le=10)] = 0.05
    temperature: Temperature = 4.0
    weight_temperature: Annotated[float, Field(ge=0.01, le=1000)] = 4.0
    warmup_epochs: Annotated[int, Field(ge=0), max_value(10**6)] = 20

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        return GKLModule(self, dataset.num_classes)


class GKLModule(nn.Module):
    """The loss of the batch of all processes, a scalar, with the class weights, which are kept with it.

    `weights` [C, C] are those of the epoch before, by label; `sums` those of `epoch` so far.
    """

    weights: Tensor
    sums: Tensor
    epoch: Tensor

    def __init__(self, config: GKL, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))
        self.register_buffer("epoch", torch.zeros(()))

    def forward(self, inputs: LossInputs) -> Tensor:
        config, progress = self.config, inputs.progress
        teacher = inputs.teacher.logits_at(1.0)
        self._observe(teacher, inputs.labels, progress.epoch)
        loss = gkl_loss(
            all_gather_with_grad(inputs.student.logits),
            all_gather_with_grad(teacher),
            all_gather_with_grad(self.weights[inputs.labels] ** config.gamma),
            value_at(config.temperature, progress),
            alpha=value_at(config.alpha, progress),
            beta=value_at(config.beta, progress),
        )
        return warmup_factor(config.warmup_epochs, progress) * loss

    @torch.no_grad()
    def _observe(self, teacher: Tensor, labels: Tensor, epoch: float) -> None:
        """Add a batch to the sums of its epoch; at its first batch those of the epoch before become the weights."""
        begins = self.epoch != epoch
        totals = self.sums.sum(1, keepdim=True)  # 0 of a label that the epoch before had no sample of
        means = torch.where(totals > 0, self.sums / totals.clamp(min=1e-12), self.weights)
        self.weights.copy_(torch.where(begins, means, self.weights))
        probabilities = F.softmax(soften(teacher, self.config.weight_temperature), 1).to(self.sums.dtype)
        classes = torch.arange(len(self.sums), device=labels.device)
        one_hot = (labels[:, None] == classes).to(self.sums.dtype)  # F.one_hot waits for the device
        found = all_gather_row(one_hot.T @ probabilities).sum(0)
        self.sums.copy_(torch.where(begins, found, self.sums + found))
        self.epoch.fill_(epoch)


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 16.0,
) -> Tensor:
    """Compute beta / 4 * S + alpha * cross entropy of the softmaxes of logits / T, averaged over the samples, a scalar.

    S is the mean over samples and pairs (i, j) of classes of (d_i - d_j)^2, each with the weight w_i w_j, of the
    differences d of the logits. All of them are [B, num_classes]. The result is float32 or wider.

    Example:
        >>> gkl_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.ones(1, 2), alpha=0.0)
        tensor(32.)
    """
    student = to_float32(student_logits)
    weights, difference = weights.to(student.dtype), student - teacher_logits.to(student.dtype)
    total = weights.sum(1, keepdim=True)
    centered = difference - (weights * difference).sum(1, keepdim=True) / total
    # The sum over pairs of w_i w_j (d_i - d_j)^2 is twice the sum of weights times that of w_i (d_i - mean)^2.
    pairs = 2 * total[:, 0] * (weights * centered.square()).sum(1)
    squares = pairs.sum() / total.square().sum()
    teacher = F.softmax(soften(teacher_logits, temperature), 1)
    entropy = -(teacher * F.log_softmax(soften(student_logits, temperature).to(teacher.dtype), 1)).sum(1).mean()
    return (beta / 4 * squares + alpha * entropy).to(student.dtype)
