"""The inputs of a loss: what student and teacher computed for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kdpipe.stages.losses.schedules import TrainProgress
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape
from kdpipe.stages.targets.outputs import TeacherTargets

Shapes = Mapping[str, Shape]
"""Shapes of the student's features by module path."""

TeacherShapes = Mapping[FeatureSpec, Shape]
"""Shapes of the teacher's features as a store serves them."""


@dataclass(frozen=True)
class DatasetInfo:
    """Sizes of the data set, which a loss may need before the first batch."""

    num_samples: int
    num_classes: int


@dataclass(frozen=True)
class Negatives:
    """Negatives of contrastive losses: random other samples of the data set, in the same view.

    The teacher's features are [K, ...], labels and ranks int64 [K], as in `LossInputs`.
    """

    features: Mapping[FeatureSpec, Tensor]
    labels: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class LossInputs:
    """Outputs of student and teacher for the same B samples.

    Attributes:
        student: Logits [B, num_classes], and features [B, ...] by module path.
        teacher: Logits for a temperature, and features [B, ...] by `FeatureSpec`.
        labels: int64 [B]; -1 for samples without a class, which a loss with `one_label` does not get.
        ranks: int64 [B], the position of each sample among all sorted ids, from 0.
        progress: The training progress, which schedules depend on.
        negatives: Negatives, for losses that use them.
        input_gradient: Gradient of the student's cross entropy with respect to the images, [B, C, H, W], part of the
            autograd graph, for losses that use it.
        targets: The labels (0 or 1) or numbers of the samples, float32 [B, K], NaN where not known; None of classes.
    """

    student: ModelOutput
    teacher: TeacherTargets
    labels: Tensor
    ranks: Tensor
    progress: TrainProgress
    negatives: Negatives | None = None
    input_gradient: Tensor | None = None
    targets: Tensor | None = None

    def rows(self, index: Tensor) -> LossInputs:
        """Return the inputs of some of the samples, index int64 [n]."""
        return replace(
            self,
            student=self.student.rows(index),
            teacher=self.teacher.rows(index),
            labels=self.labels[index],
            ranks=self.ranks[index],
            input_gradient=None if self.input_gradient is None else self.input_gradient[index],
            targets=None if self.targets is None else self.targets[index],
        )
