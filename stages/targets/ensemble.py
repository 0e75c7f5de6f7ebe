"""Combine the outputs of several teachers into one target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.class_map import ClassMapConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.outputs import TeacherTargets, TopKTargets

Share = Annotated[float, Field(ge=0)]


@section
class TeachersConfig:
    """Configuration of how the logits of several stores become one target; lists are in the order of `student.stores`.

    Attributes:
        ensemble: the mean of "logits" or of "probabilities".
        weights: "equal"; one number per teacher; by the teacher's "accuracy" on the validation images (without
            data.validation_share, the test images); by its "confidence" in each sample's label; or "learnable", by the
            cross entropy of the combined target with the labels.
        temperatures: one per teacher, instead of the loss's.
        classes: for each teacher "same" (its classes are the student's), "names" (match classes by name), or a table
            from its class names to the student's.
    """

    ensemble: Literal["logits", "probabilities"] = "logits"
    weights: Literal["equal", "accuracy", "confidence", "learnable"] | tuple[Share, ...] = "equal"
    temperatures: tuple[Annotated[float, Field(ge=0.01, le=1000)], ...] = ()
    classes: tuple[ClassMapConfig, ...] = ()

    def class_map(self, number: int) -> ClassMapConfig:
        """Return the class map configuration of teacher `number`."""
        return self.classes[number] if self.classes else "same"


def check_teachers(config: TeachersConfig, num_stores: int) -> None:
    """Raise RecipeError if the lists of `student.teachers` do not match `student.stores`."""
    lists = {"temperatures": config.temperatures, "classes": config.classes}
    given = {key: values for key, values in lists.items() if values}
    if isinstance(config.weights, tuple):
        given["weights"] = config.weights
    for key, values in given.items():
        if len(values) != num_stores:
            raise RecipeError(
                f"student.teachers.{key} has {len(values)} entries for {num_stores} stores: give one per store."
            )
    if isinstance(config.weights, tuple) and max(config.weights) <= 0:
        raise RecipeError("student.teachers.weights are all 0: set at least one above 0.")


class TeacherEnsemble(nn.Module):
    """The combination of several teachers; it has parameters only if the teachers' weights are learnable."""

    def __init__(self, config: TeachersConfig, num_teachers: int, accuracies: Sequence[float] | None = None) -> None:
        """Initialize the teachers' weights; `accuracies` on the test images are required if `weights` is "accuracy"."""
        super().__init__()
        self.config = config
        learns = config.weights == "learnable" and num_teachers > 1
        self.scores = nn.Parameter(torch.zeros(num_teachers)) if learns else None
        self.shares = _shares(config, num_teachers, accuracies)

    def forward(
        self, teachers: Sequence[TeacherTargets], target_masks: Sequence[Tensor | None], labels: Tensor
    ) -> EnsembleTargets:
        """Combine the outputs of the teachers.

        Args:
            teachers: The outputs of each teacher.
            target_masks: For each teacher, which samples it has targets for, bool [B] on any device; None for all.
            labels: int64 [B].
        """
        everything = torch.ones_like(labels, dtype=torch.bool)
        masks = [everything if mask is None else mask.to(labels.device, non_blocking=True) for mask in target_masks]
        has_target = torch.stack(masks, 1)
        weights = torch.where(has_target, self._weights(teachers, labels, has_target), 0)
        # If only teachers of weight 0 have a sample, they are its targets: the limit of ever smaller weights.
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, has_target.to(weights.dtype))
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return EnsembleTargets(tuple(teachers), weights, self.config)

    def _weights(self, teachers: Sequence[TeacherTargets], labels: Tensor, has_target: Tensor) -> Tensor:
        """Return each teacher's weight for each sample, [B, num_teachers], before normalization."""
        if self.config.weights == "confidence" and len(teachers) > 1:
            return confidence(torch.stack([teacher.logits_at(1.0) for teacher in teachers], 1), labels, has_target)
        if self.scores is not None:
            return self.scores.softmax(0).expand(len(labels), -1)
        return torch.tensor(self.shares).to(labels.device, non_blocking=True).expand(len(labels), -1)


def _shares(config: TeachersConfig, num_teachers: int, accuracies: Sequence[float] | None) -> tuple[float, ...]:
    """Return the teachers' weights relative to the largest; all 1 if they depend on the sample."""
    shares: Sequence[float] = (1.0,) * num_teachers
    if isinstance(config.weights, tuple):
        shares = config.weights
    elif config.weights == "accuracy" and num_teachers > 1:
        if accuracies is None:
            raise RecipeError(
                "student.teachers.weights = 'accuracy' needs each teacher's accuracy on the test images, which is not "
                "known here: give one number per teacher instead."
            )
        shares = accuracies
    largest = max(*shares, 0.0) or 1.0
    return tuple(share / largest for share in shares)


def confidence(logits: Tensor, labels: Tensor, has_target: Tensor) -> Tensor:
    """Compute each teacher's weight for each sample, [B, M], by its confidence in the label.

    (1 - exp(CE_m) / sum_j exp(CE_j)) / (M - 1), with CE the cross entropy with the label. Zhang et al. 2022
    (arXiv 2201.00007), equation 3.

    Logits are [B, M, num_classes], labels int64 [B]; `has_target`, bool [B, M], is which teachers count. They count
    equally for unlabeled samples, -1.
    """
    index = labels.clamp_min(0)[:, None, None].expand(-1, logits.shape[1], 1)
    cross_entropies = -F.log_softmax(logits, 2).gather(2, index)[..., 0]
    cross_entropies = torch.where(labels[:, None] < 0, 0, cross_entropies)
    compared = cross_entropies.masked_fill(~has_target, torch.finfo(logits.dtype).min)
    return (1 - compared.softmax(1)) / (has_target.sum(1, keepdim=True) - 1).clamp_min(1)


@dataclass(frozen=True)
class EnsembleTargets:
    """Combined outputs of several teachers, without features; weights [B, num_teachers] sum to 1."""

    teachers: tuple[TeacherTargets, ...]
    weights: Tensor
    config: TeachersConfig

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        return {}

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes] whose softmax at `temperature` is the combined target.

        For combined probabilities these are their logarithms times the temperature.
        """
        own = self.config.temperatures or (temperature,) * len(self.teachers)
        logits = [teacher.logits_at(t) * (temperature / t) for teacher, t in zip(self.teachers, own, strict=True)]
        weights = self.weights.to(logits[0].device)
        if self.config.ensemble == "logits":
            return torch.stack([weights[:, number, None] * values for number, values in enumerate(logits)]).sum(0)
        logs = [F.log_softmax(values / temperature, 1) for values in logits]
        floor = torch.finfo(weights.dtype).tiny
        weighted = [weights[:, number, None].clamp_min(floor).log() + values for number, values in enumerate(logs)]
        return temperature * torch.logsumexp(torch.stack(weighted), 0)

    def detached(self) -> EnsembleTargets:
        """Return the same without a gradient for learned weights, as a target must be."""
        return replace(self, weights=self.weights.detach())

    def with_rest_of(self, logits: Tensor) -> EnsembleTargets:
        """Return the same with `TopKTargets.with_rest_of` of each teacher that has only the largest logits."""
        return replace(
            self,
            teachers=tuple(one.with_rest_of(logits) if isinstance(one, TopKTargets) else one for one in self.teachers),
        )

    def rows(self, index: Tensor) -> EnsembleTargets:
        teachers = tuple(teacher.rows(index) for teacher in self.teachers)
        return EnsembleTargets(teachers, self.weights[index], self.config)
