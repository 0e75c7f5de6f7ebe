"""Build the losses of a recipe's `[[distill]]` entries and compute them on a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes, TeacherShapes
from kdpipe.stages.losses.user_loss import failure_of
from kdpipe.stages.losses.weighted import DistillationBatch, WeightedLoss, samples_with_targets
from kdpipe.stages.runtime.collectives import all_reduce_sum, local_share_of_mean
from kdpipe.stages.targets.ensemble import TeacherEnsemble
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec
from kdpipe.stages.targets.outputs import TeacherTargets

TEACHER_WEIGHTS = "teacher_weights"
"""The name, in metrics, of the loss that the teachers' weights are learned by."""


class Distillation(nn.Module):
    """All losses of a recipe and the ensemble of its teachers, with all that trains with the student."""

    def __init__(self, losses: Mapping[str, WeightedLoss], ensemble: TeacherEnsemble) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.ensemble = ensemble

    @property
    def configs(self) -> dict[str, Loss]:
        """Return the losses' configurations by their names in metrics and checkpoints."""
        return {name: loss.config for name, loss in self.losses.items()}  # type: ignore[misc]

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses by name, in float32 also under mixed precision, where sums would overflow."""
        with torch.autocast(batch.student.logits.device.type, enabled=False):
            batch = replace(batch, student=batch.student.to_float32())
            losses, targets = {}, batch.teachers[0]
            if len(batch.teachers) > 1 or self.ensemble.config.temperatures:
                combined = self.ensemble(batch.teachers, batch.target_masks, batch.labels)
                targets = combined.detached()
                if self._learns_weights:
                    losses[TEACHER_WEIGHTS] = _label_loss(combined, batch)
            for name, config in self.configs.items():
                with failure_of(config):
                    losses[name] = self.losses[name](batch, targets)
            return losses

    @property
    def _learns_weights(self) -> bool:
        """Return whether the teachers' weights are learned, and used by a loss."""
        used = any(config.on_logits and config.store is None for config in self.configs.values())
        return used and self.ensemble.scores is not None


def _label_loss(combined: TeacherTargets, batch: DistillationBatch) -> Tensor:
    """Compute this process's share of the cross entropy of the combined target with the labels, where there is one.

    The teachers' weights are learned by it alone: by a distillation loss they would grow for the teacher that is the
    easiest to imitate, such as one that gives all classes the same probability.
    """
    cross_entropy = (batch.hard or HardLabels(batch.labels)).losses(combined.logits_at(1.0))
    rows = samples_with_targets(batch.target_masks)
    if rows is None:
        return local_share_of_mean(cross_entropy, batch.num_samples)
    rows = rows.to(cross_entropy.device, non_blocking=True)
    return local_share_of_mean(cross_entropy[rows], max(1, all_reduce_sum(len(rows))))


def student_layers(configs: Sequence[Loss]) -> list[str]:
    """Return the paths of the student's modules that these losses use."""
    return list(dict.fromkeys(layer for config in configs for layer in config.student_layers()))


def required_of(configs: Sequence[Loss], student: Shapes, store: int) -> list[FeatureSpec]:
    """Return the features that these losses require of the teacher of store number `store`."""
    selected = [config for config in configs if (config.store or 0) == store]
    features = [feature for config in selected for feature in config.required_features(student)]
    return list(dict.fromkeys([*features, *([TEACHER_HEAD] if any(config.needs_head for config in selected) else [])]))


def build_distillation(
    configs: Sequence[Loss],
    student: Shapes,
    teachers: Sequence[TeacherShapes],
    *,
    ensemble: TeacherEnsemble,
    dataset: DatasetInfo,
    seed: int,
) -> Distillation:
    """Build one module per loss, named uniquely, with adapters initialized from `seed`.

    Raises:
        RecipeError: The shapes of student and teacher do not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses = {}
        for number, config in enumerate(configs):
            name = f"{config.loss.rpartition(':')[2].replace('.', '_')}_{number}"
            config.require_classes(dataset.num_classes)
            module = config.build(student, teachers[config.store or 0], dataset)
            losses[name] = WeightedLoss(name, config, module)
        return Distillation(losses, ensemble)
