"""Neuron selectivity transfer: match the spatial activation patterns of the channels.

NST: Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (arXiv 1707.01219).
The squared maximum mean discrepancy between the channels' L2-normalized maps, for the kernel k(x, y) = (x . y)^2. With
X [C, HW] the normalized maps of a sample and G = X^T X / C [HW, HW] their Gram matrix over positions, it equals

    mean k(t, t') + mean k(s, s') - 2 mean k(s, t)  =  ||G_t - G_s||^2

where the left side needs the products of channels, X_t X_s^T [C_t, C_s] etc., and the right side those of positions.
The Gram matrices are used for small maps, and the products of channels if positions outnumber channels; neither needs
the [B, C, C, HW] of the naive form.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import MapLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Size, map_size
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import MAP, SPATIAL_GRAM, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import spatial_gram

MAX_POSITIONS = 256
"""The largest H * W for which the teacher's Gram matrix [HW, HW] is required instead of its map."""


@section
class NST(MapLoss):
    """Maximum mean discrepancy between the channels' maps, for the kernel (x . y)^2, summed over pairs of layers.

    It equals the squared distance of the Gram matrices over positions. The larger of two maps is average-pooled first.
    Kernel and default weight are those of RepDistiller.
    """

    paper: ClassVar[str] = "Huang & Wang 2017, arXiv 1707.01219"
    requires: ClassVar[str] = "Gram matrix of positions [HW, HW] of each layer, or the map if H * W is above 256"

    loss: Literal["nst"] = "nst"
    weight: Scheduled = 50.0

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        size = map_size(student)
        is_small = size is None or math.prod(size) <= MAX_POSITIONS
        return FeatureSpec(layer, SPATIAL_GRAM if is_small else MAP, size)

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        return map_size(teacher) if feature.statistic == MAP else _grid(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        return nst_loss(student, teacher) if feature.statistic == MAP else nst_from_gram(student, teacher)


def _grid(student: Shape, gram: Shape) -> Size | None:
    """Return the (H, W) of a teacher's Gram matrix (HW, HW), assuming the student's aspect ratio."""
    size, positions = map_size(student), gram[0]
    if size is None or math.prod(size) == positions:
        return size
    height = round(math.sqrt(positions * size[0] / size[1]))
    return (height, positions // height) if height and positions % height == 0 else None


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss of each sample, [B], from maps [B, C_s, H, W] and [B, C_t, H, W], in the cheaper way.

    Example:
        >>> nst_loss(torch.eye(4)[None, None], torch.ones(1, 3, 4, 4))
        tensor([1.5000])
    """
    if student.shape[2] * student.shape[3] > max(student.shape[1], teacher.shape[1]):
        return nst_from_channels(student, teacher)
    teacher = to_float32(teacher)
    with torch.autocast(teacher.device.type, enabled=False):
        return nst_from_gram(student, spatial_gram(teacher))


def nst_from_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ||G_t - G_s||^2 of each sample, [B], from student maps [B, C, H, W] and the teacher's G [B, HW, HW]."""
    student = to_float32(student)
    # The two matrices are nearly equal: half precision would round their difference away.
    with torch.autocast(student.device.type, enabled=False):
        return (spatial_gram(student) - teacher.to(student.dtype)).square().sum((1, 2))


def nst_from_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss of each sample, [B], from maps [B, C_s, H, W] and [B, C_t, H, W], without [HW, HW]."""
    student = to_float32(student)
    s = F.normalize(student.flatten(2), dim=2)
    t = F.normalize(teacher.to(student.dtype).flatten(2), dim=2)
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean over pairs of channels of (x . y)^2, [B], from maps [B, C, HW] and [B, C', HW]."""
    with torch.autocast(first.device.type, enabled=False):
        return torch.bmm(first, second.transpose(1, 2)).square().mean((1, 2))
