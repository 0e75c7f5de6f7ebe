"""Several teachers of one student: how what several stores say of a sample becomes one target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.class_map import ClassMapConfig
from stages.config import section
from stages.errors import RecipeError
from stages.features import TeacherOutputs
from stages.forms import Wanted

Share = Annotated[float, Field(ge=0)]


@section
class TeachersConfig:
    """How the logits of several stores become one target, in the order of `student.stores`.

    ensemble: the mean of "logits", or of "probabilities".
    weights: "equal"; one number a teacher; by the teacher's "accuracy" on the test images; by its "confidence" in each
    sample's label; or "learnable", trained with the student.
    temperatures: each teacher's own, instead of the loss's.
    classes: for each teacher "same" (its classes are the student's, one by one), "names" (those of equal names are),
    or a table of its names with the student's.
    """

    ensemble: Literal["logits", "probabilities"] = "logits"
    weights: Literal["equal", "accuracy", "confidence", "learnable"] | tuple[Share, ...] = "equal"
    temperatures: tuple[Annotated[float, Field(gt=0, le=1e4)], ...] = ()
    classes: tuple[ClassMapConfig, ...] = ()

    def class_map(self, number: int) -> ClassMapConfig:
        """What is said of the classes of teacher `number`."""
        return self.classes[number] if self.classes else "same"


def check_teachers(config: TeachersConfig, num_stores: int) -> None:
    """Raise RecipeError where the lists of `student.teachers` are not as long as `student.stores`."""
    lists = {"temperatures": config.temperatures, "classes": config.classes}
    given = {key: values for key, values in lists.items() if values}
    if isinstance(config.weights, tuple):
        given["weights"] = config.weights
    for key, values in given.items():
        if len(values) != num_stores:
            raise RecipeError(
                f"student.teachers.{key} has {len(values)} entries and there are {num_stores} stores: one for each."
            )
    if isinstance(config.weights, tuple) and max(config.weights) <= 0:
        raise RecipeError("student.teachers.weights are all 0: give one teacher a weight above 0.")


class Combination(nn.Module):
    """The teachers as one: its only weights, if any, are those of learnable shares."""

    def __init__(self, config: TeachersConfig, num_teachers: int, accuracies: Sequence[float] | None = None) -> None:
        """accuracies: each teacher's share of right answers, where `weights` is "accuracy". Raises RecipeError where
        they are wanted and not there.
        """
        super().__init__()
        self.config = config
        learns = config.weights == "learnable" and num_teachers > 1
        self.scores = nn.Parameter(torch.zeros(num_teachers)) if learns else None
        self.shares = _shares(config, num_teachers, accuracies)

    def forward(self, teachers: Sequence[TeacherOutputs], known: Sequence[Tensor | None], labels: Tensor) -> Together:
        """One teacher of several. known: which samples each knows, bool [B] on any device; None for all. labels:
        int64 [B].
        """
        everything = torch.ones_like(labels, dtype=torch.bool)
        masks = [everything if mask is None else mask.to(labels.device, non_blocking=True) for mask in known]
        knows = torch.stack(masks, 1)
        weights = torch.where(knows, self._weights(teachers, labels, knows), 0)
        # A sample that only teachers of weight 0 know is theirs all the same: the limit of ever smaller weights.
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, knows.to(weights.dtype))
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return Together(tuple(teachers), weights, self.config)

    def _weights(self, teachers: Sequence[TeacherOutputs], labels: Tensor, knows: Tensor) -> Tensor:
        """What each teacher counts for each sample, [B, num_teachers], before they are made to add up to 1."""
        if self.config.weights == "confidence" and len(teachers) > 1:
            return confidence(torch.stack([teacher.logits_at(1.0) for teacher in teachers], 1), labels, knows)
        if self.scores is not None:
            return self.scores.softmax(0).expand(len(labels), -1)
        return torch.tensor(self.shares, device=labels.device).expand(len(labels), -1)


def _shares(config: TeachersConfig, num_teachers: int, accuracies: Sequence[float] | None) -> tuple[float, ...]:
    """What each teacher counts for every sample, of the largest; the same for all, where that goes by the sample."""
    shares: Sequence[float] = (1.0,) * num_teachers
    if isinstance(config.weights, tuple):
        shares = config.weights
    elif config.weights == "accuracy" and num_teachers > 1:
        if accuracies is None:
            raise RecipeError(
                "student.teachers.weights = 'accuracy' needs each teacher's share of right answers on the test images, "
                "which is not known here: give one number a teacher instead."
            )
        shares = accuracies
    largest = max(*shares, 0.0) or 1.0
    return tuple(share / largest for share in shares)


def confidence(logits: Tensor, labels: Tensor, knows: Tensor) -> Tensor:
    """Each teacher's weight for each sample, [B, M], from logits [B, M, num_classes], labels int64 [B] and which
    samples each knows, bool [B, M]: the others are not compared.

    (1 - exp(CE_m) / sum_j exp(CE_j)) / (M - 1), CE being the cross entropy with the label: who is surer of the truth
    counts more. Zhang et al. 2022 (arXiv 2201.00007), equation 3.
    """
    cross_entropies = -F.log_softmax(logits, 2).gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    compared = cross_entropies.masked_fill(~knows, torch.finfo(logits.dtype).min)
    return (1 - compared.softmax(1)) / (knows.sum(1, keepdim=True) - 1).clamp_min(1)


@dataclass(frozen=True)
class Together:
    """What several teachers say as one: weights [B, num_teachers], adding up to 1. Features stay each teacher's own."""

    teachers: tuple[TeacherOutputs, ...]
    weights: Tensor
    config: TeachersConfig

    @property
    def features(self) -> Mapping[Wanted, Tensor]:
        return {}

    def logits_at(self, temperature: float) -> Tensor:
        """Logits [B, num_classes] whose softmax at `temperature` is the combined one; of probabilities, their logarithm
        times the temperature.
        """
        own = self.config.temperatures or (temperature,) * len(self.teachers)
        said = [teacher.logits_at(one) * (temperature / one) for teacher, one in zip(self.teachers, own, strict=True)]
        weights = self.weights.to(said[0].device)
        if self.config.ensemble == "logits":
            return torch.stack([weights[:, [number]] * one for number, one in enumerate(said)]).sum(0)
        logs = [F.log_softmax(one / temperature, 1) for one in said]
        floor = torch.finfo(weights.dtype).tiny
        shares = [weights[:, [number]].clamp_min(floor).log() + one for number, one in enumerate(logs)]
        return temperature * torch.logsumexp(torch.stack(shares), 0)

    def rows(self, index: Tensor) -> Together:
        return Together(tuple(teacher.rows(index) for teacher in self.teachers), self.weights[index], self.config)
