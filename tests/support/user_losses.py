"""Losses as users write them: a function, a function of the whole batch, a torch module, and two classes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdpipe.losses import FeatureLoss, LogitLoss, LossInputs
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


def logit_mae(student_logits: Tensor, teacher_logits: Tensor, *, margin: float = 0.0) -> Tensor:
    """Mean absolute error of the logits.

    Args:
        margin: errors up to this size are ignored.
    """
    return ((student_logits - teacher_logits).abs() - margin).relu().mean(1)


def batch_spread(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of the standard deviations over the batch, and of the labels' logits: one value for the batch."""
    of_labels = [logits.gather(1, labels[:, None]).mean() for logits in (student_logits, teacher_logits)]
    spread = (student_logits.std(0) - teacher_logits.std(0)).square().sum()
    return spread + (of_labels[0] - of_labels[1]).abs()


class Projected(nn.Module):
    """Squared error of logits that a linear layer maps."""

    def __init__(self, num_classes: int, *, power: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(num_classes, num_classes)
        self.power = power

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (self.linear(student_logits) - teacher_logits).abs().pow(self.power).mean(1)


class LogitMAE(LogitLoss):
    """Mean absolute error of the logits at T = 1.

    Attributes:
        margin: errors up to this size are ignored.
    """

    paper: ClassVar[str] = "Ours 2026"

    margin: float = 0.0

    def compute(self, inputs: LossInputs) -> Tensor:
        return logit_mae(inputs.student.logits, inputs.teacher.logits_at(1.0), margin=self.margin)


class ChannelMeans(FeatureLoss):
    """Squared error of the channels' means, through a linear layer."""

    requires: ClassVar[str] = "pooled vector [C] of each layer"

    scale: float = 1.0

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, "pooled")

    def build_pair(self, pair: tuple[str, str], feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return MeansOfPair(student[0], teacher[0], self.scale)


class MeansOfPair(nn.Module):
    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(channels, width), scale

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.scale * (self.linear(student.mean((2, 3))) - teacher).square().mean(1)


def no_loss(images: Tensor) -> Tensor:
    return torch.zeros(len(images))


NUMBER = 3
