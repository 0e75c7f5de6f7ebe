"""Attention transfer with activation-based maps; `at_gradient` has the gradient-based ones.

AT: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", ICLR (arXiv 1612.03928).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import MapLossConfig
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Size, map_size
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import ATTENTION, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import attention, pool_to

Variant = Literal["code", "paper"]


@section
class ATConfig(MapLossConfig):
    """Distance between the attention maps of student and teacher, summed over pairs of layers.

    An attention map is the mean over channels of the squared activations, L2-normalized; the larger of two maps is
    average-pooled first. The default weight is that of RepDistiller.

    Attributes:
        variant: "code" is the mean over pixels of the squared differences, as in RepDistiller; "paper" is the L2 norm of
            the difference (equation 2), which is larger by orders of magnitude and needs a smaller weight.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"

    loss: Literal["at"]
    weight: Scheduled = 1000.0
    variant: Variant = "code"

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, ATTENTION, map_size(student))

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        return (teacher[0], teacher[1]) if len(teacher) == 2 else None

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        return attention_distance(attention(student), teacher, self.variant)


def at_loss(student: Tensor, teacher: Tensor, form: Variant = "code") -> Tensor:
    """Compute the loss at one pair of maps, of which the larger is average-pooled.

    Maps are [B, C_s, H, W] and [B, C_t, H', W']. The result is a scalar in float32 or wider.
    """
    student, teacher = to_float32(student), to_float32(teacher)
    student_map = attention(pool_to(student, (teacher.shape[2], teacher.shape[3])))
    teacher_map = attention(pool_to(teacher, (student.shape[2], student.shape[3])))
    return attention_distance(student_map, teacher_map, form).mean()


def attention_distance(student: Tensor, teacher: Tensor, form: Variant) -> Tensor:
    """Compute the distance of L2-normalized attention maps [B, H, W] of each sample, [B]."""
    difference = (student - teacher.to(student.dtype)).flatten(1)
    if form == "paper":  # torch's gradient of the norm is 0 at 0
        norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return norms
    return difference.square().mean(1)
