"""Channel-wise distillation: where each channel of a map is active.

CWD: Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV (arXiv 2011.13256).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair, map_size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import MAP, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to


@section
class CWD(FeatureLoss):
    """T^2 * KL divergence over the positions of each channel, averaged over channels, summed over pairs of layers.

    The student's map goes through a 1x1 convolution if the numbers of channels differ, and the larger map is
    average-pooled. Defaults are those of the authors' code for feature maps.

    Attributes:
        temperature: T of the softmax over the positions.
    """

    paper: ClassVar[str] = "Shu et al. 2021, arXiv 2011.13256"

    loss: Literal["cwd"] = "cwd"
    weight: Scheduled = 50.0
    temperature: Annotated[float, Field(ge=0.01, le=1000)] = 1.0

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, MAP, map_size(student))

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        size = map_size(teacher)
        if size is None or not poolable(student, size):
            raise shape_mismatch_error(self.loss, pair, student, teacher, "layers with maps, the student's no smaller")
        return ChannelModule(student[0], teacher, self.temperature)


class ChannelModule(nn.Module):
    """The loss of each sample, [B], with the 1x1 convolution of one pair of layers, which trains with the student."""

    def __init__(self, channels: int, teacher: Shape, temperature: float) -> None:
        super().__init__()
        same = channels == teacher[0]
        self.adapter = nn.Identity() if same else nn.Conv2d(channels, teacher[0], 1)
        self.size = teacher[1], teacher[2]
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd_loss(self.adapter(pool_to(student, self.size)), teacher, self.temperature)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T^2 * the mean over channels of KL(p_t, p_s) of each sample, [B], from maps [B, C, H, W] of one shape.

    p is the softmax of a channel's values / T over its positions. The result is float32 or wider.

    Example:
        >>> cwd_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 2.0]]]]))
        tensor([0.3278])
    """
    student = to_float32(student)
    log_student, log_teacher = (
        F.log_softmax(maps.to(student.dtype).flatten(2) / temperature, 2) for maps in (student, teacher)
    )
    losses = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(2)
    return temperature**2 * losses.mean(1)
