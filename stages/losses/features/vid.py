"""Variational information distillation: predict the teacher's features from the student's.

VID: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", CVPR (arXiv 1904.05835). The mutual
information of two layers is bounded from below by the likelihood of the teacher's features under a Gaussian, whose mean
is predicted from the student's features and whose variance is learned per channel.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.shapes import Pair, as_map_shape, as_maps, map_size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to

MIN_VARIANCE = 1e-5


@section
class VID(FeatureLoss):
    """Negative log-likelihood of the teacher's features, predicted from the student's, summed over pairs of layers.

    Three 1x1 convolutions predict the mean, on maps of equal aspect ratio, the larger average-pooled; vectors count as
    maps of one pixel. Defaults are those of RepDistiller.

    Attributes:
        init_pred_var: initial variance of each of the teacher's channels, which is learned.
    """

    paper: ClassVar[str] = "Ahn et al. 2019, arXiv 1904.05835"

    loss: Literal["vid"] = "vid"
    init_pred_var: Annotated[float, Field(gt=MIN_VARIANCE, le=1e6)] = 5.0

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, size=map_size(as_map_shape(student)))

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        student_maps, teacher_maps = as_map_shape(student), as_map_shape(teacher)
        size = map_size(teacher_maps)
        if size is None or not poolable(student_maps, size):
            expected = "layers whose maps have the same aspect ratio, or vectors"
            raise shape_mismatch_error(self.loss, pair, student, teacher, expected)
        return VIDModule(student_maps[0], teacher_maps[0], self.init_pred_var)


class VIDModule(nn.Module):
    """The negative log-likelihood of each sample, [B], at one pair of layers, with the predictor of the teacher."""

    def __init__(self, student_channels: int, teacher_channels: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        above = variance - MIN_VARIANCE
        inverse = above + math.log(-math.expm1(-above))  # softplus(inverse) = above, without overflow of exp(above)
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), inverse))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = as_maps(teacher)
        maps = pool_to(as_maps(to_float32(student)), (teacher.shape[2], teacher.shape[3]))
        mean, variance = self.predict(maps)
        return vid_loss(mean, variance, teacher)

    def predict(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the teacher's mean [B, C_t, H, W] and variance [C_t] from the student's maps [B, C_s, H, W]."""
        return to_float32(self.mean(maps)), F.softplus(self.log_scale) + MIN_VARIANCE


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Compute half of (mean - teacher)^2 / variance + log variance of each sample, [B], averaged over its elements.

    The constant log(2 pi) / 2 of the likelihood is left out, as in RepDistiller, so that the loss can be negative.

    Mean and teacher are [B, C, H, W], the variance [C]. The result is float32 or wider.

    Example:
        >>> vid_loss(torch.ones(2, 4, 8, 8), torch.full((4,), 2.0), torch.zeros(2, 4, 8, 8))
        tensor([0.5966, 0.5966])
    """
    mean = to_float32(mean)
    spread = variance.to(mean.dtype)[:, None, None]
    error = (mean - teacher.to(mean.dtype)).square()
    return 0.5 * (error / spread + spread.log()).flatten(1).mean(1)
