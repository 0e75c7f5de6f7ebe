"""Build the losses of a recipe's `[[distill]]` entries and compute them on a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdpipe.stages.losses.base import LogitLoss, Loss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Negatives, Shapes, TeacherShapes
from kdpipe.stages.losses.logits.standardize import standardize_logits
from kdpipe.stages.losses.sample_selection import compute_sample_weights, select_samples
from kdpipe.stages.losses.schedules import TrainProgress, value_at
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.runtime.collectives import all_reduce_sum, num_processes
from kdpipe.stages.targets.ensemble import TeacherEnsemble
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.outputs import TeacherTargets, TransformedTargets


@dataclass(frozen=True)
class DistillationBatch:
    """Outputs of a student and of all its teachers for a batch of B samples.

    Attributes:
        student: Logits [B, num_classes], and features [B, ...] by module path.
        teachers: The outputs of each teacher.
        target_masks: For each teacher, which samples it has targets for, bool [B] on the CPU; None for all.
        labels: int64 [B].
        ranks: int64 [B], as in `LossInputs`.
        progress: The training progress.
        negatives: The negatives by loss name.
        input_gradient: As in `LossInputs`.
        global_batch_size: The samples of all processes; None if they are the B of this one.
    """

    student: ModelOutput
    teachers: Sequence[TeacherTargets]
    target_masks: Sequence[Tensor | None]
    labels: Tensor
    ranks: Tensor
    progress: TrainProgress
    negatives: Mapping[str, Negatives]
    input_gradient: Tensor | None = None
    global_batch_size: int | None = None


class WeightedLoss(nn.Module):
    """The loss of one entry on its samples, times its weight and their share of the batch."""

    def __init__(self, name: str, config: Loss, loss: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.loss = loss

    def forward(self, batch: DistillationBatch, ensemble: TeacherTargets) -> Tensor:
        """Compute this process's share of the weighted loss of the global batch; the mean of the shares is the loss."""
        inputs, may_be_partial = self._select_samples(batch, ensemble)
        batch_size = len(batch.labels) if batch.global_batch_size is None else batch.global_batch_size
        num_local = len(inputs.labels)
        # A process without such samples takes the same path as the others, which wait for it at collectives.
        num_used = all_reduce_sum(num_local) if may_be_partial else batch_size
        if num_used == 0:
            return batch.student.logits.new_zeros(())
        sample_weights = compute_sample_weights(self.config.samples, inputs.teacher, inputs.labels)
        if num_local == num_used == 1 < batch_size:  # batch norm needs two rows; twice the same has the same mean
            inputs = inputs.rows(torch.zeros(2, dtype=torch.int64, device=inputs.labels.device))
        loss: Tensor = self.loss(self._normalize_logits(inputs))
        if sample_weights is not None:
            loss = sample_weights.to(loss) * loss
        weight = value_at(self.config.weight, batch.progress)
        if not self.config.per_sample:
            return weight * (num_used / batch_size) * loss.mean()
        return weight * (num_local * num_processes() / batch_size) * (loss.mean() if num_local else loss.sum())

    def _select_samples(self, batch: DistillationBatch, ensemble: TeacherTargets) -> tuple[LossInputs, bool]:
        """Return the inputs of the loss's samples, and whether these may be fewer than the batch."""
        uses_ensemble = self.config.store is None and self.config.on_logits
        number = self.config.store or 0
        inputs = LossInputs(
            batch.student,
            ensemble if uses_ensemble else batch.teachers[number],
            batch.labels,
            batch.ranks,
            batch.progress,
            batch.negatives.get(self.name),
            batch.input_gradient,
        )
        rows = _samples_with_targets(batch.target_masks if uses_ensemble else [batch.target_masks[number]])
        if rows is not None and len(rows) < len(inputs.labels):
            inputs = inputs.rows(rows.to(inputs.labels.device, non_blocking=True))
        selected = select_samples(self.config.samples, inputs.teacher, inputs.labels)
        if selected is not None:
            inputs = inputs.rows(selected)
        return inputs, rows is not None or selected is not None

    def _normalize_logits(self, inputs: LossInputs) -> LossInputs:
        if not isinstance(self.config, LogitLoss) or not self.config.standardize:
            return inputs
        student = ModelOutput(standardize_logits(inputs.student.logits), inputs.student.features)
        teacher = TransformedTargets(inputs.teacher, lambda logits, _: standardize_logits(logits))
        return replace(inputs, student=student, teacher=teacher)


def _samples_with_targets(target_masks: Sequence[Tensor | None]) -> Tensor | None:
    """Return the samples that any of the teachers has targets for, int64 [n]; None if that is always every sample."""
    masks = [mask for mask in target_masks if mask is not None]
    return torch.stack(masks).any(0).nonzero()[:, 0] if len(masks) == len(target_masks) else None


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
            targets = batch.teachers[0]
            if len(batch.teachers) > 1 or self.ensemble.config.temperatures:
                targets = self.ensemble(batch.teachers, batch.target_masks, batch.labels)
            return {name: loss(batch, targets) for name, loss in self.losses.items()}


def student_layers(configs: Sequence[Loss]) -> list[str]:
    """Return the paths of the student's modules that these losses use."""
    return list(dict.fromkeys(layer for config in configs for layer in config.student_layers()))


def required_of(configs: Sequence[Loss], student: Shapes, store: int) -> list[FeatureSpec]:
    """Return the features that these losses require of the teacher of store number `store`."""
    selected = [config for config in configs if (config.store or 0) == store]
    return list(dict.fromkeys(feature for config in selected for feature in config.required_features(student)))


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
            name = f"{config.loss}_{number}"
            module = config.build(student, teachers[config.store or 0], dataset)
            losses[name] = WeightedLoss(name, config, module)
        return Distillation(losses, ensemble)
