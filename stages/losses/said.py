"""What student and teacher say about a batch: all that a loss may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from stages.features import Outputs, TeacherOutputs
from stages.forms import Shape, Wanted
from stages.schedules import Moment

Shapes = Mapping[str, Shape]
"""Shapes of the student's features by module path."""

TeacherShapes = Mapping[Wanted, Shape]
"""Shapes of what a store gives of a teacher's layers."""


@dataclass(frozen=True)
class Facts:
    """What a loss may have to know of the data set before the first batch."""

    num_samples: int
    num_classes: int


@dataclass(frozen=True)
class Others:
    """Other samples of the data set in the same view, drawn at random: what contrastive losses push away from.

    features: what the teacher says of them, [K, ...]. labels, ranks: int64 [K], as in `Said`.
    """

    features: Mapping[Wanted, Tensor]
    labels: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class Said:
    """What student and teacher say about the same B samples.

    student: logits [B, num_classes] and features [B, ...] by module path. teacher: logits at a temperature, features
    by `Wanted`. labels: int64 [B]. ranks: int64 [B], each sample's place among all ids, from 0. others: samples to
    contrast with, where a loss asks for them. input_gradient: the gradient of the student's cross entropy by the
    pixels, [B, C, H, W], part of the graph, where a loss asks for it.
    """

    student: Outputs
    teacher: TeacherOutputs
    labels: Tensor
    ranks: Tensor
    moment: Moment
    others: Others | None = None
    input_gradient: Tensor | None = None

    def rows(self, index: Tensor) -> Said:
        """The same of some of the samples, int64 [n]."""
        gradient = None if self.input_gradient is None else self.input_gradient[index]
        return replace(
            self,
            student=self.student.rows(index),
            teacher=self.teacher.rows(index),
            labels=self.labels[index],
            ranks=self.ranks[index],
            input_gradient=gradient,
        )
