"""Variational information distillation: the student is to hold all that the teacher's layer tells. Ahn et al. 2019.

arXiv 1904.05835: the mutual information of the two layers is bounded from below by how well a Gaussian, whose mean is
predicted from the student and whose variance is learnt for each channel, fits the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.config import section
from stages.forms import Shape, Wanted, pool_to, widened
from stages.losses.entry import Entry, Pairs, students_of
from stages.losses.match_size import as_map_shape, as_maps, cannot_join, map_size, poolable
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount

SMALLEST_VARIANCE = 1e-5


@section
class VIDConfig(Entry):
    """weight times the negative log-likelihood of the teacher's features, predicted from the student's at each pair.

    The prediction is three 1x1 convolutions on maps of like sizes, the larger averaged down; vectors count as maps of
    one pixel. init_pred_var: the variance of each of the teacher's channels at the start; it is learnt.
    """

    paper: ClassVar[str] = "Ahn et al. 2019, arXiv 1904.05835"

    loss: Literal["vid"]
    layers: Pairs
    init_pred_var: Annotated[float, Field(gt=SMALLEST_VARIANCE, le=1e6)] = 5.0
    weight: Amount = 1.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return tuple(Wanted(theirs, size=map_size(as_map_shape(student[mine]))) for mine, theirs in self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        wanted = self.wants(student)
        predictors = [
            _predictor(pair, student[pair[0]], teacher[one], self.init_pred_var)
            for pair, one in zip(self.layers, wanted, strict=True)
        ]
        return VID(self.layers, wanted, predictors)


def _predictor(pair: tuple[str, str], student: Shape, teacher: Shape, variance: float) -> Predictor:
    """Raises RecipeError, with both shapes, where they are not maps or vectors of like sizes."""
    mine, theirs = as_map_shape(student), as_map_shape(teacher)
    size = map_size(theirs)
    if size is None or not poolable(mine, size):
        raise cannot_join("vid", pair, student, teacher, "layers that give maps of like height and width, or vectors")
    return Predictor(mine[0], theirs[0], variance)


class Predictor(nn.Module):
    """From a student's maps [B, C_s, H, W] to a mean [B, C_t, H, W] and a variance [C_t] of the teacher's."""

    def __init__(self, student_channels: int, teacher_channels: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        above = variance - SMALLEST_VARIANCE
        inverse = above + math.log(-math.expm1(-above))  # softplus of it is `above`, which exp would overflow for
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), inverse))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return widened(self.mean(maps)), F.softplus(self.log_scale) + SMALLEST_VARIANCE


class VID(nn.Module):
    """Each sample's negative log-likelihood, summed over the pairs, [B], with what predicts the teacher."""

    def __init__(self, pairs: Pairs, wanted: Sequence[Wanted], predictors: Sequence[Predictor]) -> None:
        super().__init__()
        self.pairs = pairs
        self.wanted = tuple(wanted)
        self.predictors = nn.ModuleList(predictors)

    def forward(self, said: Said) -> Tensor:
        parts = []
        for (mine, _), wanted, predict in zip(self.pairs, self.wanted, self.predictors, strict=True):
            theirs = as_maps(said.teacher.features[wanted])
            own = pool_to(as_maps(widened(said.student.features[mine])), (theirs.shape[2], theirs.shape[3]))
            mean, variance = predict(own)
            parts.append(vid_per_sample(mean, variance, theirs))
        return torch.stack(parts).sum(0)


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Half of (mean - teacher)^2 / variance + log variance, averaged over all elements; a scalar in float32 or wider.

    mean, teacher: [B, C, H, W]; variance: [C]. The constant log(2 pi) / 2 of the likelihood is left out, as in the
    field's reference code, so that the loss can be negative.
    """
    return vid_per_sample(mean, variance, teacher).mean()


def vid_per_sample(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """`vid_loss` of each sample: [B]."""
    mean = widened(mean)
    spread = variance.to(mean.dtype)[:, None, None]
    error = (mean - teacher.to(mean.dtype)).square()
    return 0.5 * (error / spread + spread.log()).flatten(1).mean(1)
