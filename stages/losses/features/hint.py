"""Hints: regression of the teacher's feature map from the student's, through an adapter.

FitNets: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", ICLR (arXiv 1412.6550). Here the hint is trained
together with the other losses, as in RepDistiller; `fitnet` has the paper's two stages.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair, token_advice
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class Hint(FeatureLoss):
    """Mean squared error between the student's map, through an adapter, and the teacher's, summed over pairs of layers.

    The default weight is that of RepDistiller.
    """

    paper: ClassVar[str] = "Romero et al. 2015, arXiv 1412.6550"

    loss: Literal["hint"] = "hint"
    weight: Scheduled = 100.0

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return HintModule(student, teacher)


class HintModule(nn.Module):
    """The squared error of each sample, [B], with the adapter of one pair of layers, which trains with the student."""

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.adapter = adapter(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(self.adapter(student), teacher)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error of each sample, [B], in float32 or wider, from features [B, ...] of one shape.

    Example:
        >>> hint_loss(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
        tensor([1., 1.])
    """
    student = to_float32(student)
    return F.mse_loss(student, teacher.to(student.dtype), reduction="none").flatten(1).mean(1)


def adapter(student: Shape, teacher: Shape) -> nn.Module:
    """Build the module that maps the student's features to the teacher's shape.

    Maps (C, H, W) get a convolution with batch norm and ReLU: 1x1 if H and W are equal, strided if the student's map is
    twice as large, transposed if it is half as large, unpadded if it is larger by another amount. Vectors (D,) get a
    linear layer.

    Raises:
        RecipeError: No adapter fits these shapes.
    """
    if len(student) == len(teacher) == 1:
        return nn.Linear(student[0], teacher[0])
    if len(student) == len(teacher) == 3:
        convolution = _convolution(student, teacher)
        if convolution is not None:
            return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU())
    raise RecipeError(
        f"a hint cannot join a student's feature of shape {list(student)} to a teacher's of shape {list(teacher)}: "
        f"choose layers whose maps have similar sizes{token_advice(student, teacher)}."
    )


def _convolution(student: Shape, teacher: Shape) -> nn.Module | None:
    (channels, height, width), (out_channels, *sizes) = student, teacher
    if [height, width] == [2 * size for size in sizes]:
        return nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
    if [2 * height, 2 * width] == sizes:
        return nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1, bias=False)
    if height >= sizes[0] and width >= sizes[1]:
        return nn.Conv2d(channels, out_channels, (1 + height - sizes[0], 1 + width - sizes[1]), bias=False)
    return None
