"""Variational information distillation: predict the teacher's features from the student's.

VID: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", CVPR (arXiv 1904.05835). The mutual
information of two layers is bounded from below by the likelihood of the teacher's features under a Gaussian, whose mean
is predicted from the student's features and whose variance is learned per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import FeatureLossConfig, Pairs
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.shapes import as_map_shape, as_maps, map_size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to

MIN_VARIANCE = 1e-5


@section
class VIDConfig(FeatureLossConfig):
    """Negative log-likelihood of the teacher's features, predicted from the student's, summed over pairs of layers.

    Three 1x1 convolutions predict the mean, on maps of equal aspect ratio, the larger average-pooled; vectors count as
    maps of one pixel. Defaults are those of RepDistiller.

    Attributes:
        init_pred_var: initial variance of each of the teacher's channels, which is learned.
    """

    paper: ClassVar[str] = "Ahn et al. 2019, arXiv 1904.05835"

    loss: Literal["vid"]
    init_pred_var: Annotated[float, Field(gt=MIN_VARIANCE, le=1e6)] = 5.0

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return tuple(
            FeatureSpec(teacher_layer, size=map_size(as_map_shape(student[student_layer])))
            for student_layer, teacher_layer in self.layers
        )

    def build(self, student: Shapes, teacher: TeacherShapes, facts: DatasetInfo) -> nn.Module:
        features = self.required_features(student)
        predictors = [
            _predictor(pair, student[pair[0]], teacher[feature], self.init_pred_var)
            for pair, feature in zip(self.layers, features, strict=True)
        ]
        return VID(self.layers, features, predictors)


def _predictor(pair: tuple[str, str], student: Shape, teacher: Shape, variance: float) -> Predictor:
    student_maps, teacher_maps = as_map_shape(student), as_map_shape(teacher)
    size = map_size(teacher_maps)
    if size is None or not poolable(student_maps, size):
        raise shape_mismatch_error(
            "vid", pair, student, teacher, "layers whose maps have the same aspect ratio, or vectors"
        )
    return Predictor(student_maps[0], teacher_maps[0], variance)


class Predictor(nn.Module):
    """A predictor of the teacher's mean [B, C_t, H, W] and variance [C_t] from the student's maps [B, C_s, H, W]."""

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

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return to_float32(self.mean(maps)), F.softplus(self.log_scale) + MIN_VARIANCE


class VID(nn.Module):
    """The negative log-likelihood of each sample, [B], summed over the pairs, with the predictors of the teacher."""

    def __init__(self, pairs: Pairs, features: Sequence[FeatureSpec], predictors: Sequence[Predictor]) -> None:
        super().__init__()
        self.pairs = pairs
        self.features = tuple(features)
        self.predictors = nn.ModuleList(predictors)

    def forward(self, inputs: LossInputs) -> Tensor:
        parts = []
        for (layer, _), feature, predict in zip(self.pairs, self.features, self.predictors, strict=True):
            teacher = as_maps(inputs.teacher.features[feature])
            maps = as_maps(to_float32(inputs.student.features[layer]))
            mean, variance = predict(pool_to(maps, (teacher.shape[2], teacher.shape[3])))
            parts.append(vid_per_sample(mean, variance, teacher))
        return torch.stack(parts).sum(0)


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Compute half of (mean - teacher)^2 / variance + log variance, averaged over all elements.

    The constant log(2 pi) / 2 of the likelihood is left out, as in RepDistiller, so that the loss can be negative.

    Mean and teacher are [B, C, H, W], the variance [C]. The result is a scalar in float32 or wider.
    """
    return vid_per_sample(mean, variance, teacher).mean()


def vid_per_sample(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Compute `vid_loss` of each sample, [B]."""
    mean = to_float32(mean)
    spread = variance.to(mean.dtype)[:, None, None]
    error = (mean - teacher.to(mean.dtype)).square()
    return 0.5 * (error / spread + spread.log()).flatten(1).mean(1)
