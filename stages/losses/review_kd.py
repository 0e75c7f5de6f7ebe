"""Knowledge review: every stage of the teacher teaches through what all the deeper stages of the student know.

Chen et al. 2021 (arXiv 2104.09044). From deep to shallow, the student's maps are fused with those of the deeper stages
by an attention (the paper's ABF), and what comes out is compared with the teacher's map at several scales (its HCL).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.config import at_most, section
from stages.forms import Shape, Wanted, widened
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.match_size import as_map_shape, as_maps, cannot_join
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount

MOST_CHANNELS = 512
POOLED_SIZES = (4, 2, 1)


@section
class ReviewKDConfig(Entry):
    """weight times the error, at several scales, of the student's stages, fused from deep to shallow, to the teacher's.

    layers: pairs of (student layer, teacher layer) from shallow to deep, maps of any size; the last may be vectors, as
    the pooled embeddings of the reference code. weight: the reference code's is between 0.6 and 8, by networks.
    mid_channels: of the fused maps; by default those of the student's deepest layer, 512 at most. warmup_epochs: the
    loss grows linearly over these.
    """

    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2104.09044"

    loss: Literal["review_kd"]
    layers: Pairs
    weight: Amount = 1.0
    mid_channels: Annotated[int, Field(ge=1), at_most(10**6)] | None = None
    warmup_epochs: Annotated[int, Field(ge=0), at_most(10**6)] = 20

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return ReviewKD(self, student, teacher)


class ReviewKD(nn.Module):
    """The error of each sample, summed over the pairs, [B], with the fusions, which train with the student.

    Raises RecipeError, with both shapes, where a pair is neither of maps nor of vectors.
    """

    def __init__(self, config: ReviewKDConfig, student: Shapes, teacher: TeacherShapes) -> None:
        super().__init__()
        self.config = config
        widths = [_channels(pair, student[pair[0]], teacher[Wanted(pair[1])]) for pair in config.layers]
        middle = config.mid_channels or min(MOST_CHANNELS, widths[-1][0])
        self.fusions = nn.ModuleList(
            Fusion(mine, middle, theirs, fuses=index < len(widths) - 1) for index, (mine, theirs) in enumerate(widths)
        )

    def forward(self, said: Said) -> Tensor:
        parts, deeper = [], None
        for fusion, (mine, theirs) in zip(reversed(self.fusions), reversed(self.config.layers), strict=True):
            target = as_maps(said.teacher.features[Wanted(theirs)])
            size = (target.shape[2], target.shape[3])
            reviewed, deeper = fusion(as_maps(widened(said.student.features[mine])), deeper, size)
            parts.append(hcl_per_sample(reviewed, target))
        share = min((said.moment.epoch + 1) / max(1, self.config.warmup_epochs), 1.0)
        return share * torch.stack(parts).sum(0)


def _channels(pair: tuple[str, str], student: Shape, teacher: Shape) -> tuple[int, int]:
    mine, theirs = as_map_shape(student), as_map_shape(teacher)
    if len(mine) == len(theirs) == 3:
        return mine[0], theirs[0]
    raise cannot_join("review_kd", pair, student, teacher, "layers that give maps, or vectors")


class Fusion(nn.Module):
    """A stage of the student with what came from the deeper ones: to the teacher's shape, and on to the shallower one.

    Maps [B, C_s, H, W], the deeper stages' [B, mid, h, w], where it `fuses`, and the teacher's (H', W') give
    [B, C_t, H', W'] and [B, mid, H', W'].
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
    """Batch norm that stands a batch of one pixel, which has no variance, by its running statistics."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.numel() == maps.shape[1]:
            return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The hierarchical context loss of two maps [B, C, H, W]: a scalar in float32 or wider.

    The mean squared error of the whole maps, and of the maps averaged down to 4, 2 and 1 pixels a side where that is
    smaller, at weights 1, 1/2, 1/4 and 1/8, divided by the sum of the weights used.
    """
    return hcl_per_sample(student, teacher).mean()


def hcl_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """`hcl_loss` of each sample: [B, C, H, W] twice to [B]."""
    student = widened(student)
    difference = student - teacher.to(student.dtype)
    loss, total, weight = difference.square().flatten(1).mean(1), 1.0, 1.0
    for size in POOLED_SIZES:
        if size < min(difference.shape[2:]):
            weight /= 2
            coarse = F.adaptive_avg_pool2d(difference, size)  # averaging is linear: one pooling serves both maps
            loss = loss + weight * coarse.square().flatten(1).mean(1)
            total += weight
    return loss / total
