"""Neuron selectivity transfer: the student's channels are to fire in the patterns of the teacher's.

Huang and Wang 2017 (arXiv 1707.01219): the squared maximum mean discrepancy between the channels' maps, each scaled to
length 1, for the kernel k(x, y) = (x . y)^2. With X [C, HW] the scaled maps of one sample and G = X^T X / C [HW, HW]
their Gram matrix over positions, it is one number by two routes:

    mean k(t, t') + mean k(s, s') - 2 mean k(s, t)  =  ||G_t - G_s||^2

where the left side needs the channels' products, X_t X_s^T [C_t, C_s] and the like, and the right side the positions'.
The loss takes the Gram matrices of small maps, and the channels' products where positions outnumber channels; neither
makes the [B, C, C, HW] of the naive form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import section
from stages.forms import MAP, SPATIAL_GRAM, Shape, Wanted, pool_to, spatial_gram, widened
from stages.losses.entry import Entry, Pairs, students_of
from stages.losses.match_size import Size, cannot_join, map_size, poolable
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount

MOST_POSITIONS = 256
"""The largest H * W of whose maps the teacher's Gram matrix, [HW, HW], is asked for, rather than the map."""


@section
class NSTConfig(Entry):
    """weight times the maximum mean discrepancy between the channels' maps at each pair of (student, teacher) layers.

    The larger of two maps is averaged down first. The kernel is the polynomial one, (x . y)^2, as in the field's
    reference code; matching Gram matrices over positions is the same loss under another name.
    """

    paper: ClassVar[str] = "Huang & Wang 2017, arXiv 1707.01219"

    loss: Literal["nst"]
    layers: Pairs
    weight: Amount = 50.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return tuple(_wanted(theirs, map_size(student[mine])) for mine, theirs in self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        wanted = self.wants(student)
        sizes = [
            _size(pair, student[pair[0]], one, teacher[one]) for pair, one in zip(self.layers, wanted, strict=True)
        ]
        return NST(self.layers, wanted, sizes)


def _wanted(layer: str, size: Size | None) -> Wanted:
    few = size is None or math.prod(size) <= MOST_POSITIONS
    return Wanted(layer, SPATIAL_GRAM if few else MAP, size)


def _size(pair: tuple[str, str], student: Shape, wanted: Wanted, teacher: Shape) -> Size:
    """The (H, W) to which the student's maps (C, H, W) are pooled. Raises RecipeError, with both shapes."""
    size = map_size(teacher) if wanted.form == MAP else _grid(student, teacher)
    if size is None or not poolable(student, size):
        raise cannot_join("nst", pair, student, teacher, "layers that give maps of like height and width")
    return size


def _grid(student: Shape, gram: Shape) -> Size | None:
    """The (H, W) of a teacher's Gram matrix (HW, HW), which has forgotten it: the student's proportions."""
    size, positions = map_size(student), gram[0]
    if size is None or math.prod(size) == positions:
        return size
    height = round(math.sqrt(positions * size[0] / size[1]))
    return (height, positions // height) if height and positions % height == 0 else None


class NST(nn.Module):
    """The discrepancy of each sample, summed over the pairs, [B]; sizes: the (H, W) of each pair."""

    def __init__(self, pairs: Pairs, wanted: Sequence[Wanted], sizes: Sequence[Size]) -> None:
        super().__init__()
        self.pairs = pairs
        self.wanted = tuple(wanted)
        self.sizes = tuple(sizes)

    def forward(self, said: Said) -> Tensor:
        parts = []
        for (mine, _), wanted, size in zip(self.pairs, self.wanted, self.sizes, strict=True):
            own = pool_to(widened(said.student.features[mine]), size)
            per_sample = nst_per_sample if wanted.form == MAP else nst_from_gram
            parts.append(per_sample(own, said.teacher.features[wanted]))
        return torch.stack(parts).sum(0)


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss at one pair of maps, [B, C_s, H, W] and [B, C_t, H', W'], the larger averaged down; a scalar in float32
    or wider.
    """
    student, teacher = widened(student), widened(teacher)
    own = pool_to(student, (teacher.shape[2], teacher.shape[3]))
    return nst_per_sample(own, pool_to(teacher, (student.shape[2], student.shape[3]))).mean()


def nst_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of each sample, [B], of maps [B, C_s, H, W] and [B, C_t, H, W], by the cheaper of the two routes."""
    if student.shape[2] * student.shape[3] > max(student.shape[1], teacher.shape[1]):
        return nst_from_channels(student, teacher)
    teacher = widened(teacher)
    with torch.autocast(teacher.device.type, enabled=False):
        return nst_from_gram(student, spatial_gram(teacher))


def nst_from_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||^2 of each sample, [B], of the student's maps [B, C, H, W] and the teacher's G [B, HW, HW]."""
    student = widened(student)
    # A difference of near numbers: half precision would leave little of it.
    with torch.autocast(student.device.type, enabled=False):
        return (spatial_gram(student) - teacher.to(student.dtype)).square().sum((1, 2))


def nst_from_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The discrepancy of each sample, [B], of maps [B, C_s, H, W] and [B, C_t, H, W], without [HW, HW]."""
    student = widened(student)
    own = F.normalize(student.flatten(2), dim=2)
    theirs = F.normalize(teacher.to(student.dtype).flatten(2), dim=2)
    return _mean_kernel(theirs, theirs) + _mean_kernel(own, own) - 2 * _mean_kernel(own, theirs)


def _mean_kernel(one: Tensor, other: Tensor) -> Tensor:
    """The mean over pairs of channels of (x . y)^2: [B, C, HW] and [B, C', HW] to [B]."""
    with torch.autocast(one.device.type, enabled=False):
        return torch.bmm(one, other.transpose(1, 2)).square().mean((1, 2))
