"""The loss of one `[[distill]]` entry: a loss on its samples, times its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.inputs import LossInputs, Negatives
from kdpipe.stages.losses.sample_selection import SampleSelection, compute_sample_weights, select_samples
from kdpipe.stages.losses.schedules import Scheduled, TrainProgress, value_at
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_reduce_sum, num_processes
from kdpipe.stages.targets.outputs import TeacherTargets, TransformedTargets

EPS = 1e-7
"""Added to the standard deviation of logits, as in the code of Sun et al."""


class LossSettings(Protocol):
    """What a loss is weighted by: the keys of every entry, and `LogitLoss.standardize`."""

    @property
    def weight(self) -> Scheduled: ...
    @property
    def store(self) -> int | None: ...
    @property
    def samples(self) -> SampleSelection: ...
    @property
    def per_sample(self) -> bool: ...
    @property
    def on_logits(self) -> bool: ...
    @property
    def needs_labels(self) -> bool: ...


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
        hard: The labels of mixed samples; None if those of `labels` are all.
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
    hard: HardLabels | None = None

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all processes."""
        return len(self.labels) if self.global_batch_size is None else self.global_batch_size


class WeightedLoss(nn.Module):
    """The mean loss of one entry on its samples, times its weight."""

    def __init__(self, name: str, config: LossSettings, loss: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.loss = loss

    def forward(self, batch: DistillationBatch, ensemble: TeacherTargets) -> Tensor:
        """Compute this process's share of the weighted loss of the global batch; the mean of the shares is the loss."""
        inputs, has_all = self._with_targets(batch, ensemble)
        # A process without such samples takes the same path as the others, which wait for it at collectives.
        num_targets = num_used = batch.num_samples if has_all else all_reduce_sum(len(inputs.labels))
        selected = select_samples(self.config.samples, inputs.teacher, inputs.labels)
        if selected is not None:
            inputs = inputs.rows(selected)
            num_used = all_reduce_sum(len(selected))
        if num_used == 0:
            return batch.student.logits.new_zeros(())
        num_local = len(inputs.labels)
        sample_weights = compute_sample_weights(self.config.samples, inputs.teacher, inputs.labels)
        # Batch norm needs two rows; twice the same has the same mean.
        if num_local == num_used == 1 < batch.num_samples:
            inputs = inputs.rows(torch.zeros(2, dtype=torch.int64, device=inputs.labels.device))
        loss: Tensor = self.loss(self._normalize_logits(inputs))
        wanted = [len(inputs.labels)] if self.config.per_sample else []
        if list(loss.shape) != wanted:
            raise RecipeError(
                f"the loss {type(self.config).__name__} returned a tensor of shape {list(loss.shape)}, and {wanted} is "
                "wanted: one value for each sample, [B], or one for the batch, [], if it has per_sample = False."
            )
        if sample_weights is not None:
            loss = sample_weights.to(loss) * loss
        weight = value_at(self.config.weight, batch.progress)
        # The mean over the selected samples; samples without targets count as 0.
        if not self.config.per_sample:
            return weight * (num_targets / batch.num_samples) * loss.mean()
        share = num_local * num_processes() * num_targets / (num_used * batch.num_samples)
        return weight * share * (loss.mean() if num_local else loss.sum())

    def _with_targets(self, batch: DistillationBatch, ensemble: TeacherTargets) -> tuple[LossInputs, bool]:
        """Return the inputs of the samples with targets, and with labels if the loss needs them.

        Also whether these are always all of the batch.
        """
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
            None if batch.hard is None else batch.hard.targets,
        )
        rows = samples_with_targets(batch.target_masks if uses_ensemble else [batch.target_masks[number]])
        if self.config.needs_labels and batch.hard is not None and not batch.hard.always:
            labeled = (batch.labels != UNLABELED).cpu()
            rows = labeled.nonzero()[:, 0] if rows is None else rows[labeled[rows]]
        if rows is not None and len(rows) < len(inputs.labels):
            inputs = inputs.rows(rows.to(inputs.labels.device, non_blocking=True))
        return inputs, rows is None

    def _normalize_logits(self, inputs: LossInputs) -> LossInputs:
        if getattr(self.config, "rest", "equal") == "student" and hasattr(inputs.teacher, "with_rest_of"):
            inputs = replace(inputs, teacher=inputs.teacher.with_rest_of(inputs.student.logits))
        if not getattr(self.config, "standardize", False):
            return inputs
        student = ModelOutput(standardize_logits(inputs.student.logits), inputs.student.features)
        teacher = TransformedTargets(inputs.teacher, lambda logits, _: standardize_logits(logits))
        return replace(inputs, student=student, teacher=teacher)


def samples_with_targets(target_masks: Sequence[Tensor | None]) -> Tensor | None:
    """Return the samples that any of the teachers has targets for, int64 [n]; None if that is always every sample."""
    masks = [mask for mask in target_masks if mask is not None]
    return torch.stack(masks).any(0).nonzero()[:, 0] if len(masks) == len(target_masks) else None


def standardize_logits(logits: Tensor) -> Tensor:
    """Compute (z - mean) / (std + 1e-7) over the classes, with the unbiased std, in float32 or wider.

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", CVPR (arXiv 2403.01427), algorithm 1: the
    student need not match the scale of the teacher's logits.

    [B, num_classes] to [B, num_classes]. Rows of equal logits, as those of one class, become zeros without a gradient.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    # Minus the row's maximum, equal logits are exactly 0, and so is their deviation, however their mean is rounded.
    shifted = to_float32(logits)
    shifted = shifted - shifted.detach().amax(1, keepdim=True)
    centered = shifted - shifted.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / max(1, logits.shape[1] - 1)
    varies = variance > 0
    # sqrt(0) has an infinite derivative, which would be NaN even in the branch not taken.
    deviation = torch.where(varies, variance, 1).sqrt() + EPS
    return torch.where(varies, centered / deviation, 0)
