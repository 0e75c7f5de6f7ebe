"""Knowledge review: each stage of the teacher is compared with the student's stage fused with all deeper ones.

ReviewKD: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", CVPR (arXiv 2104.09044). From deep to shallow,
the student's maps are fused with those of the deeper stages by an attention (the paper's ABF), and the result is
compared with the teacher's map at several scales (its HCL).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import warmup_factor
from kdpipe.stages.losses.shapes import as_map_shape, as_maps, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape
from kdpipe.stages.targets.statistics import average_pool

MAX_CHANNELS = 512
POOLED_SIZES = (4, 2, 1)


@section
class ReviewKD(FeatureLoss):
    """Error, at several scales, between the student's stages, fused from deep to shallow, and the teacher's.

    Defaults are those of the authors' code.

    Attributes:
        layers: pairs of (student layer, teacher layer) from shallow to deep, maps of any size; the last may be vectors,
            as the pooled embeddings of the authors' code.
        weight: factor of the loss; the authors' code uses 0.6 to 8, depending on the networks.
        mid_channels: width of the fused maps; by default that of the student's deepest layer, at most 512.
        warmup_epochs: epochs over which the loss grows linearly to its full value; 0 for no warm-up.
    """

    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2104.09044"

    loss: Literal["review_kd"] = "review_kd"
    mid_channels: Annotated[int, Field(ge=1), max_value(10**6)] | None = None
    warmup_epochs: Annotated[int, Field(ge=0), max_value(10**6)] = 20

    def with_widths_of(self, student: Shapes) -> ReviewKD:
        width = as_map_shape(student[self.layers[-1][0]])[0]
        return replace(self, mid_channels=self.mid_channels or min(MAX_CHANNELS, width))

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        return ReviewKDModule(self, student, teacher)


class ReviewKDModule(nn.Module):
    """The error of each sample, [B], summed over the pairs, with the fusions, which train with the student."""

    def __init__(self, config: ReviewKD, student: Shapes, teacher: TeacherShapes) -> None:
        super().__init__()
        self.config = config
        widths = [_channels(pair, student[pair[0]], teacher[FeatureSpec(pair[1])]) for pair in config.layers]
        middle = config.mid_channels or min(MAX_CHANNELS, widths[-1][0])
        self.fusions = nn.ModuleList(
            Fusion(width, middle, teacher_width, fuses=index < len(widths) - 1)
            for index, (width, teacher_width) in enumerate(widths)
        )

    def forward(self, inputs: LossInputs) -> Tensor:
        parts, deeper = [], None
        for fusion, (student_layer, teacher_layer) in zip(
            reversed(self.fusions), reversed(self.config.layers), strict=True
        ):
            target = as_maps(inputs.teacher.features[FeatureSpec(teacher_layer)])
            size = (target.shape[2], target.shape[3])
            reviewed, deeper = fusion(as_maps(to_float32(inputs.student.features[student_layer])), deeper, size)
            parts.append(hcl_loss(reviewed, target))
        return warmup_factor(self.config.warmup_epochs, inputs.progress) * torch.stack(parts).sum(0)


def _channels(pair: tuple[str, str], student: Shape, teacher: Shape) -> tuple[int, int]:
    student_maps, teacher_maps = as_map_shape(student), as_map_shape(teacher)
    if len(student_maps) == len(teacher_maps) == 3:
        return student_maps[0], teacher_maps[0]
    raise shape_mismatch_error("review_kd", pair, student, teacher, "layers that output maps, or vectors")


class Fusion(nn.Module):
    """The fusion of a stage of the student with the deeper ones (ABF).

    The student's maps [B, C_s, H, W], the fused maps of the deeper stages [B, mid, h, w], if it `fuses`, and the
    teacher's (H', W') give maps like the teacher's [B, C_t, H', W'], and those for the next shallower stage
    [B, mid, H', W'].
    """

    def __init__(self, channels: int, middle: int, teacher_channels: int, *, fuses: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), Norm(middle))
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.leave = nn.Sequential(
            nn.Conv2d(middle, teacher_channels, 3, padding=1, bias=False), Norm(teacher_channels)
        )
        for convolution in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        fused = self.enter(maps)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.attend(torch.cat([fused, deeper], 1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.leave(fused), fused


class Norm(nn.BatchNorm2d):
    """Batch norm that uses the running statistics for a batch of one pixel, which has no variance."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.numel() == maps.shape[1]:
            return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the hierarchical context loss of each sample, [B], in float32 or wider, from two maps [B, C, H, W].

    The mean squared error of the full maps, and of the maps average-pooled to 4, 2 and 1 pixels per side (where that is
    smaller), at weights 1, 1/2, 1/4 and 1/8, divided by the sum of the weights used.

    Example:
        >>> hcl_loss(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
        tensor([1., 1.])
    """
    student = to_float32(student)
    difference = student - teacher.to(student.dtype)
    loss, weight_sum, weight = difference.square().flatten(1).mean(1), 1.0, 1.0
    for size in POOLED_SIZES:
        if size < min(difference.shape[2:]):
            weight /= 2
            coarse = average_pool(difference, (size, size))  # pooling is linear
            loss = loss + weight * coarse.square().flatten(1).mean(1)
            weight_sum += weight
    return loss / weight_sum
