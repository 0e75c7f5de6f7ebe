"""Attention transfer: the student is to be active where the teacher is. Zagoruyko and Komodakis 2017 (1612.03928).

Here are the activation-based maps; `at_gradient` has the gradient-based ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stages.config import section
from stages.forms import ATTENTION, Wanted, attention, pool_to, widened
from stages.losses.entry import Entry, Pairs, students_of
from stages.losses.match_size import Size, cannot_join, map_size, poolable
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount

Form = Literal["code", "paper"]


@section
class ATConfig(Entry):
    """weight times the distance between the attention maps at each pair of (student layer, teacher layer).

    An attention map is the mean over channels of the squares, scaled to length 1; the larger of two maps is averaged
    down first. variant: "code" is the mean over the pixels of the squared differences, as the field's reference code has
    it; "paper" is the length of the difference (equation 2), which is larger by orders of magnitude and wants a
    smaller weight.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"

    loss: Literal["at"]
    layers: Pairs
    weight: Amount = 1000.0
    variant: Form = "code"

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return tuple(Wanted(theirs, ATTENTION, map_size(student[mine])) for mine, theirs in self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        wanted = self.wants(student)
        sizes = [_size(pair, student[pair[0]], teacher[one]) for pair, one in zip(self.layers, wanted, strict=True)]
        return AT(self, wanted, sizes)


def _size(pair: tuple[str, str], student: tuple[int, ...], teacher: tuple[int, ...]) -> Size:
    """The teacher's (H, W), to which the student's maps (C, H, W) are pooled. Raises RecipeError."""
    if len(teacher) == 2 and poolable(student, (teacher[0], teacher[1])):
        return teacher[0], teacher[1]
    raise cannot_join("at", pair, student, teacher, "layers that give maps of like height and width")


class AT(nn.Module):
    """The distance of each sample's attention maps, summed over the pairs, [B]; sizes: each pair's (H, W)."""

    def __init__(self, config: ATConfig, wanted: Sequence[Wanted], sizes: Sequence[Size]) -> None:
        super().__init__()
        self.config = config
        self.wanted = tuple(wanted)
        self.sizes = tuple(sizes)

    def forward(self, said: Said) -> Tensor:
        parts = []
        for (mine, _), wanted, size in zip(self.config.layers, self.wanted, self.sizes, strict=True):
            own = attention(pool_to(widened(said.student.features[mine]), size))
            parts.append(attention_distance(own, said.teacher.features[wanted], self.config.variant))
        return torch.stack(parts).sum(0)


def at_loss(student: Tensor, teacher: Tensor, form: Form = "code") -> Tensor:
    """The loss at one pair of maps, [B, C_s, H, W] and [B, C_t, H', W'], the larger averaged down; a scalar in float32
    or wider. `form` as in `ATConfig`.
    """
    student, teacher = widened(student), widened(teacher)
    own = attention(pool_to(student, (teacher.shape[2], teacher.shape[3])))
    theirs = attention(pool_to(teacher, (student.shape[2], student.shape[3])))
    return attention_distance(own, theirs, form).mean()


def attention_distance(student: Tensor, teacher: Tensor, form: Form) -> Tensor:
    """How far apart two batches of attention maps [B, H, W], each of length 1, are: [B]."""
    difference = (student - teacher.to(student.dtype)).flatten(1)
    if form == "paper":  # where there is no difference, torch's gradient of the norm is 0
        lengths: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return lengths
    return difference.square().mean(1)
