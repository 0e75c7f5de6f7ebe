"""Wasserstein distance of feature distributions: of each channel's mean and standard deviation over the positions.

WKD-F: Lv, Yang and Li 2024, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
NeurIPS (arXiv 2412.08139), section 3.2, with diagonal covariances as in the authors' code.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair, map_size, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import MEAN_STD, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import mean_std


@section
class WKDF(FeatureLoss):
    """Squared 2-Wasserstein distance of normal distributions with the channels' means and deviations, over pairs.

    The student's map goes through a 1x1 convolution with batch norm and ReLU; its size does not matter. Defaults are
    those of the authors' code for a ResNet-8x4 on CIFAR-100, which lowers the weight along a cosine from epoch 150 of
    240: `weight = { start = 0.08, end = 0.0, shape = "cosine", epochs = [150, 240] }`. On ImageNet they use 0.02 and
    `mean_weight = 2`.

    Attributes:
        mean_weight: weight of the squared difference of the means against that of the deviations.
    """

    paper: ClassVar[str] = "Lv et al. 2024, arXiv 2412.08139"
    requires: ClassVar[str] = "means and standard deviations [2, C] of the channels of each layer"

    loss: Literal["wkd_f"] = "wkd_f"
    weight: Scheduled = 0.08
    mean_weight: Annotated[float, Field(ge=0), max_value(1e6)] = 4.0

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, MEAN_STD)

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        if map_size(student) is None or len(teacher) != 2:
            raise shape_mismatch_error(self.loss, pair, student, teacher, "layers with maps")
        return WKDFModule(student[0], teacher[1], self.mean_weight)


class WKDFModule(nn.Module):
    """The loss of each sample, [B], with the adapter of one pair of layers, which trains with the student."""

    def __init__(self, student: int, teacher: int, mean_weight: float) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(student, teacher, 1), nn.BatchNorm2d(teacher), nn.ReLU())
        self.mean_weight = mean_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return wkd_f_loss(mean_std(self.adapter(student)), teacher, mean_weight=self.mean_weight)


def wkd_f_loss(student: Tensor, teacher: Tensor, *, mean_weight: float = 4.0) -> Tensor:
    """Compute the sum over channels of mean_weight (m_s - m_t)^2 + (d_s - d_t)^2 of each sample, [B].

    Student and teacher are means m and deviations d, [B, 2, C], or maps [B, C, H, W]. The result is float32 or wider.

    Example:
        >>> wkd_f_loss(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [5.0]]]))
        tensor([13.])
    """
    student, teacher = (mean_std(one) if one.dim() == 4 else to_float32(one) for one in (student, teacher))
    squares = (student - teacher.to(student.dtype)).square().sum(2)
    return mean_weight * squares[:, 0] + squares[:, 1]
