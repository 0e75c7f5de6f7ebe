"""Hints: the student's feature map, through an adapter, towards the teacher's. FitNets, Romero et al. 2015 (1412.6550).

Here the hint is trained together with everything else, as the field's reference code does; `fitnet` has the paper's
two stages.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import section
from stages.errors import RecipeError
from stages.forms import Wanted, widened
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount


@section
class HintConfig(Entry):
    """weight times the mean squared error at each pair of (student layer, teacher layer)."""

    paper: ClassVar[str] = "Romero et al. 2015, arXiv 1412.6550"

    loss: Literal["hint"]
    layers: Pairs
    weight: Amount = 100.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return Hint(self.layers, student, teacher)


class Hint(nn.Module):
    """The squared error of each sample, summed over the pairs, [B], through adapters that train with the student and
    are not part of it.
    """

    def __init__(self, pairs: Pairs, student: Shapes, teacher: TeacherShapes) -> None:
        super().__init__()
        self.pairs = pairs
        self.adapters = nn.ModuleList(adapter(student[mine], teacher[Wanted(theirs)]) for mine, theirs in pairs)

    def forward(self, said: Said) -> Tensor:
        parts = [
            hint_per_sample(adapt(said.student.features[mine]), said.teacher.features[Wanted(theirs)])
            for adapt, (mine, theirs) in zip(self.adapters, self.pairs, strict=True)
        ]
        return torch.stack(parts).sum(0)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements of two feature maps of equal shape [B, ...], in float32 or wider."""
    return hint_per_sample(student, teacher).mean()


def hint_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """`hint_loss` of each sample: [B, ...] twice to [B]."""
    student = widened(student)
    return F.mse_loss(student, teacher.to(student.dtype), reduction="none").flatten(1).mean(1)


def adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """A module that takes the student's map to the teacher's shape; both shapes without the batch axis.

    Maps (C, H, W): a convolution with BN and ReLU; 1x1 where H and W agree, strided where the student's map is twice
    as large, transposed where it is half, unpadded where it is larger by less. Vectors (D,): a linear layer.
    Raises RecipeError, with both shapes, where neither fits.
    """
    if len(student) == len(teacher) == 1:
        return nn.Linear(student[0], teacher[0])
    if len(student) == len(teacher) == 3:
        convolution = _convolution(student, teacher)
        if convolution is not None:
            return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU())
    raise RecipeError(
        f"a hint cannot join a student's feature of shape {list(student)} to a teacher's of {list(teacher)}: "
        "name layers whose maps have like sizes."
    )


def _convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module | None:
    (channels, height, width), (wanted, *sizes) = student, teacher
    if [height, width] == [2 * size for size in sizes]:
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1, bias=False)
    if [2 * height, 2 * width] == sizes:
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1, bias=False)
    if height >= sizes[0] and width >= sizes[1]:
        return nn.Conv2d(channels, wanted, (1 + height - sizes[0], 1 + width - sizes[1]), bias=False)
    return None
