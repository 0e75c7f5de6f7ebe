"""Base classes of the losses: the configuration of a `[[distill]]` entry, and the modules built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import Scheduled, Temperature
from kdpipe.stages.losses.shapes import Size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import MAP, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to

Pairs = Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
"""Pairs of (student module path, teacher module path)."""


@section
class LossConfig:
    """Configuration of a loss: the keys that every `[[distill]]` entry has.

    Attributes:
        weight: factor of the loss.
        store: index into `student.stores` of the teacher to learn from, counted from 0; by default logits come from all
            stores combined, and features from the first.
        samples: which samples the loss is computed on, and their weights.
    """

    paper: ClassVar[str]

    per_sample: ClassVar[bool] = True
    """Whether the loss is a mean of one value per sample, so that samples can be weighted."""

    one_label: ClassVar[bool] = False
    """Whether the loss needs a single label per sample, which mixed samples do not have."""

    whole_logits: ClassVar[bool] = False
    """Whether the loss needs the teacher's logits of all classes: top-k stores cannot be used."""

    on_logits: ClassVar[bool] = False
    """Whether the loss compares logits."""

    input_gradient: ClassVar[bool] = False
    """Whether the loss uses the gradient of the student's cross entropy with respect to the images."""

    loss: str
    weight: Scheduled = 1.0
    store: Annotated[int, Field(ge=0), max_value(1000)] | None = None
    samples: SampleSelection = Field(default_factory=SampleSelection)

    @property
    def num_negatives(self) -> int:
        """Return the number of negatives (other samples of the data set) per batch."""
        return int(vars(self).get("num_negatives", 0))

    @property
    def negative_features(self) -> tuple[FeatureSpec, ...]:
        """Return the teacher features required of the negatives."""
        return ()

    def student_layers(self) -> tuple[str, ...]:
        """Return the paths of the student's modules whose outputs the loss uses."""
        return ()

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        """Return the required teacher features, given the shapes of the student's features."""
        return ()

    def temperatures(self) -> tuple[Temperature, ...]:
        """Return the temperatures at which the loss takes the softmax of the teacher's logits."""
        return ()

    def build(self, student: Shapes, teacher: TeacherShapes, facts: DatasetInfo) -> nn.Module:
        """Build the loss, with the adapters and embeddings that train with the student.

        Returns:
            A module from `Said` to the unweighted loss: [B] if `per_sample`, else a scalar.

        Raises:
            RecipeError: The shapes of student and teacher do not match.
        """
        return StatelessLoss(self)

    def compute(self, inputs: LossInputs) -> Tensor:
        """Compute a loss that has no parameters; losses with parameters override `build` instead."""
        raise NotImplementedError


class StatelessLoss(nn.Module):
    """A loss without parameters, computed by its configuration."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.config.compute(inputs)


@section
class LogitLossConfig(LossConfig):
    """Configuration of a loss on logits.

    Attributes:
        standardize: normalize the logits of student and teacher to mean 0 and standard deviation 1 over the classes
            first (Sun et al. 2024, arXiv 2403.01427).
    """

    on_logits: ClassVar[bool] = True

    standardize: bool = False


@section
class FeatureLossConfig(LossConfig):
    """Configuration of a loss on pairs of layers.

    Attributes:
        layers: pairs of (student layer, teacher layer), by module path.
    """

    statistic: ClassVar[str] = MAP
    """The statistic of the teacher's layers that the loss requires."""

    layers: Pairs

    def student_layers(self) -> tuple[str, ...]:
        return tuple(student_layer for student_layer, _ in self.layers)

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return tuple(FeatureSpec(teacher_layer, self.statistic) for _, teacher_layer in self.layers)


@section
class MapLossConfig(FeatureLossConfig):
    """Configuration of a per-sample loss on feature maps of equal aspect ratio, the larger average-pooled first."""

    expected: ClassVar[str] = "layers whose maps have the same aspect ratio"
    """What to choose instead, for the error message about shapes that do not match."""

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        """Return the required feature of a teacher's layer, given the shape of the student's."""
        raise NotImplementedError

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        """Return the (H, W) of a teacher's feature, to which the student's maps are pooled; None if it has none."""
        raise NotImplementedError

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        """Compute the loss of each sample, [B], from pooled student maps [B, C, H, W] and the teacher's feature."""
        raise NotImplementedError

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return tuple(
            self.teacher_feature(teacher_layer, student[student_layer]) for student_layer, teacher_layer in self.layers
        )

    def build(self, student: Shapes, teacher: TeacherShapes, facts: DatasetInfo) -> nn.Module:
        features, sizes = self.required_features(student), []
        for pair, feature in zip(self.layers, features, strict=True):
            student_shape, teacher_shape = student[pair[0]], teacher[feature]
            size = self.common_size(student_shape, teacher_shape, feature)
            if size is None or not poolable(student_shape, size):
                raise shape_mismatch_error(self.loss, pair, student_shape, teacher_shape, self.expected)
            sizes.append(size)
        return MapLoss(self, features, sizes)


class MapLoss(nn.Module):
    """The loss of each sample, [B], summed over the pairs of layers. sizes: the (H, W) of each pair."""

    def __init__(self, config: MapLossConfig, features: Sequence[FeatureSpec], sizes: Sequence[Size]) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(features)
        self.sizes = tuple(sizes)

    def forward(self, inputs: LossInputs) -> Tensor:
        parts = []
        for layer, feature, size in zip(self.config.student_layers(), self.features, self.sizes, strict=True):
            maps = pool_to(to_float32(inputs.student.features[layer]), size)
            parts.append(self.config.distance(maps, inputs.teacher.features[feature], feature))
        return torch.stack(parts).sum(0)
