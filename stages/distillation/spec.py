"""What a student is distilled from: open stores, losses and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import required_of, student_layers
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.inputs import TeacherShapes
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import Schedule, Scheduled
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec, Shape
from kdpipe.stages.targets.join import JoinedStore, Missing, join
from kdpipe.stages.targets.reader import TargetLoadingConfig, slab_window
from kdpipe.stages.targets.resolve import arrays_needed, resolve_feature
from kdpipe.stages.training.heads import Heads
from kdpipe.store import TargetStore


@dataclass(frozen=True)
class DistillationSpec:
    """The stores and losses of a distillation, with their settings.

    Attributes:
        stores: The opened stores, one per teacher.
        shapes: The shapes of the student's features that the losses use.
        losses: The losses' configurations.
        hard_label_weight: The weight of the cross entropy with the labels.
        target_loading: How targets are loaded.
        missing_targets: What to do with samples that no store has.
        teachers: How several teachers are combined.
        accuracies: Each teacher's accuracy on the test images, if they decide its weight.
        label_smoothing: The share of each label that is spread over all classes.
        heads: The student's classifiers, if it learns labels and teacher with two.
    """

    stores: Sequence[TargetStore]
    shapes: Mapping[str, Shape]
    losses: Sequence[Loss]
    hard_label_weight: Scheduled
    target_loading: TargetLoadingConfig = field(default_factory=TargetLoadingConfig)
    missing_targets: Missing = "error"
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    accuracies: Sequence[float] | None = None
    label_smoothing: float = 0.0
    heads: Heads = field(default_factory=Heads)

    def to_json(self) -> dict[str, Any]:
        """Return everything that decides the results."""
        record = {
            "stores": [store.manifest.numbers_sha256(names) for store, names in self._names()],
            "order": slab_window(self._names(), self.target_loading),
            "losses": [_loss_json(loss) for loss in self.losses],
            "hard_label_weight": schedule_json(self.hard_label_weight),
            "missing_targets": self.missing_targets,
        }
        if self.teachers != TeachersConfig():
            record["teachers"] = asdict(self.teachers)
        if self.accuracies is not None:
            record["accuracies"] = list(self.accuracies)
        if self.label_smoothing:
            record["label_smoothing"] = self.label_smoothing
        return record | self.heads.identity

    @property
    def student_layers(self) -> list[str]:
        """Return the paths of the student's modules whose outputs are used."""
        return list(dict.fromkeys([*student_layers(self.losses), *self.heads.layers]))

    @property
    def required(self) -> list[list[FeatureSpec]]:
        """Return the features required of each store."""
        return [required_of(self.losses, self.shapes, number) for number in range(len(self.stores))]

    def with_losses(self, losses: Sequence[Loss]) -> DistillationSpec:
        """Return the same with these losses alone."""
        return replace(self, losses=tuple(losses))

    def of_output(self, losses: Sequence[Loss]) -> DistillationSpec:
        """Return the same with these losses alone, and labels, of the student's own output in place of its `heads`."""
        return replace(self, losses=tuple(losses), heads=Heads())

    def head_for(self, loss: Loss) -> NDArray[np.float32]:
        """Return the head [C, D + 1] of the teacher that a loss learns from. Raises StoreError if it is not stored."""
        store = self.stores[loss.store or 0]
        resolve_feature(store, TEACHER_HEAD)
        assert store.head is not None, "it was found"
        return store.head

    @property
    def without_hint_losses(self) -> DistillationSpec:
        """Return the losses of the student's own training: without the FitNet stages before it."""
        return self.with_losses([loss for loss in self.losses if not isinstance(loss, InitialLoss)])

    def join_stores(self, train_set: ImageSet) -> list[JoinedStore]:
        """Return the stores, joined to the training samples by id. Raises like `join`."""
        return [
            join(store, train_set, required, self.missing_targets, self.teachers.class_map(number))
            for number, (store, required) in enumerate(zip(self.stores, self.required, strict=True))
        ]

    def _names(self) -> list[tuple[TargetStore, list[str]]]:
        """Return each store with the arrays that are read of it."""
        return [
            (store, arrays_needed(store, required)) for store, required in zip(self.stores, self.required, strict=True)
        ]


def _loss_json(loss: Loss) -> dict[str, Any]:
    """Return what decides a loss, without common keys at their defaults."""
    defaults = {"store": None, "samples": asdict(SampleSelection()), "standardize": False, "rest": "equal"}
    record = {
        key: value for key, value in config_fingerprint(loss).items() if key not in defaults or value != defaults[key]
    }
    return record


def schedule_json(amount: Scheduled) -> Any:
    """Return a number or a schedule as JSON."""
    return asdict(amount) if isinstance(amount, Schedule) else amount


def shapes_of(source: JoinedStore) -> TeacherShapes:
    """Return the shapes of the required features, as the store serves them."""
    return {feature.feature: feature.shape for feature in source.features}
