"""Build the losses of a recipe's `[[distill]]` entries and compute them on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes, TeacherShapes
from kdpipe.stages.losses.user_loss import failure_of
from kdpipe.stages.losses.weighted import DistillationBatch, WeightedLoss, samples_with_targets
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.runtime.collectives import all_reduce_sum, local_share_of_mean
from kdpipe.stages.targets.ensemble import TeacherEnsemble
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec, compute_statistic, statistic_shape
from kdpipe.stages.targets.outputs import DenseTargets, TeacherTargets

TEACHER_WEIGHTS = "teacher_weights"
"""The name, in metrics, of the loss that the teachers' weights are learned by."""


Computed = Mapping[FeatureSpec, FeatureSpec]
"""What is computed of a student's layers where it is the teacher, by what the loss asks for."""


class Distillation(nn.Module):
    """All losses of a recipe and the ensemble of its teachers, with all that trains with the student.

    Attributes:
        kinds: The names of the kinds of views that a step shows; none if it shows one view.
        own_targets: By loss, what is computed of the student's layers where its own outputs are the target.
    """

    def __init__(
        self,
        losses: Mapping[str, WeightedLoss],
        ensemble: TeacherEnsemble,
        kinds: Sequence[str] = (),
        own_targets: Mapping[str, Computed] | None = None,
    ) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.ensemble = ensemble
        self.kinds, self.own_targets = tuple(kinds), dict(own_targets or {})

    @property
    def configs(self) -> dict[str, Loss]:
        """Return the losses' configurations by their names in metrics and checkpoints."""
        return {name: loss.config for name, loss in self.losses.items()}  # type: ignore[misc]

    def forward(self, *views: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses by name, in float32 also under mixed precision, where sums would overflow.

        `views` has the batch in each kind of view, in the order of `kinds`. A loss is the mean over its kinds.
        """
        with torch.autocast(views[0].student.logits.device.type, enabled=False):
            views = tuple(replace(batch, student=batch.student.to_float32()) for batch in views)
            losses, targets = {}, [batch.teachers[0] for batch in views]
            if len(views[0].teachers) > 1 or self.ensemble.config.temperatures:
                combined = [self.ensemble(batch.teachers, batch.target_masks, batch.labels) for batch in views]
                targets = [one.detached() for one in combined]
                if self._learns_weights:
                    label_losses = [_label_loss(*pair) for pair in zip(combined, views, strict=True)]
                    losses[TEACHER_WEIGHTS] = mean_of(label_losses)
            for name, config in self.configs.items():
                with failure_of(config):
                    found = [self.losses[name](*inputs) for inputs in self._inputs(name, config, views, targets)]
                    losses[name] = mean_of(found)
            return losses

    def _inputs(
        self, name: str, config: Loss, views: Sequence[DistillationBatch], targets: Sequence[TeacherTargets]
    ) -> Iterator[tuple[DistillationBatch, TeacherTargets]]:
        """Yield the batch and the combined targets of each kind of view that a loss is computed in."""
        target = None if config.target_view is None else self.kinds.index(config.target_view)
        for kind, batch in enumerate(views):
            if config.view not in (None, *self.kinds[kind : kind + 1]):
                continue
            if target is None or (target == kind and config.target == "teacher"):
                yield batch, targets[kind]
            elif config.target == "teacher":
                yield replace(batch, teachers=views[target].teachers), targets[target]
            elif target != kind:
                own = student_targets(self.own_targets[name], views[target].student)
                yield replace(batch, teachers=[own], target_masks=[None]), own

    @property
    def _learns_weights(self) -> bool:
        """Return whether the teachers' weights are learned, and used by a loss."""
        used = any(config.reads_logits and config.store is None for config in self.configs.values())
        return used and self.ensemble.scores is not None


def student_targets(computed: Computed, output: ModelOutput) -> DenseTargets:
    """Return a student's outputs as a teacher's, without gradient."""
    features = {
        wanted: compute_statistic(found, output.features[found.layer].detach()) for wanted, found in computed.items()
    }
    return DenseTargets(output.logits.detach(), features)


def mean_of(losses: Sequence[Tensor]) -> Tensor:
    """Return the mean of scalars; of a single one that one itself."""
    return losses[0] if len(losses) == 1 else torch.stack(tuple(losses)).mean()


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
    """Return the paths of the student's modules that these losses use, also as their target."""
    own = [feature.layer for one in configs if one.target == "student" for feature in one.required_features({})]
    return list(dict.fromkeys([*(layer for config in configs for layer in config.student_layers()), *own]))


def required_of(configs: Sequence[Loss], student: Shapes, store: int) -> list[FeatureSpec]:
    """Return the features that these losses require of the teacher of store number `store`."""
    selected = [config for config in configs if (config.store or 0) == store and config.target == "teacher"]
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
    kinds: Sequence[str] = (),
) -> Distillation:
    """Build one module per loss, named uniquely, with adapters initialized from `seed`.

    `kinds` are those of the views that a step shows.

    Raises:
        RecipeError: The shapes of student and teacher do not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses, own_targets = {}, {}
        for number, config in enumerate(configs):
            name = f"{config.loss.rpartition(':')[2].replace('.', '_')}_{number}"
            config.require_classes(dataset.num_classes)
            if config.target == "student":
                own_targets[name], teacher = own_features(config, student, student)
            else:
                teacher = teachers[config.store or 0]
            module = config.build(student, teacher, dataset)
            losses[name] = WeightedLoss(name, config, module)
        return Distillation(losses, ensemble, kinds, own_targets)


def own_features(config: Loss, student: Shapes, other: Shapes) -> tuple[Computed, TeacherShapes]:
    """Return what a loss needs of another student, whose features have the shapes `other`, and the shapes of that."""
    wanted = config.required_features(student)
    computed = {one: one.for_shape(other[one.layer]) for one in wanted}
    return computed, {one: statistic_shape(found, other[one.layer]) for one, found in computed.items()}
