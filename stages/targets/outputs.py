"""Outputs of a teacher for a batch: dense or top-k logits, and features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import TopK, interpolation

NO_LOGITS = (
    "the store has the teacher's embeddings and no logits: use losses on features or relations, such as cosine, hint, "
    "rkd, pkt, sp and cc, with the teacher layer 'pre_logits'."
)


class TeacherTargets(Protocol):
    """Outputs of a teacher for a batch, computed or read from a store."""

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        """Return the required features, [B, ...], and the teacher's head, [C, D + 1]."""

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, that are exact in a softmax at `temperature`."""

    def rows(self, index: Tensor) -> TeacherTargets:
        """Return the outputs for some of the samples, index int64 [n]."""


def feature_rows(features: Mapping[FeatureSpec, Tensor], index: Tensor) -> dict[FeatureSpec, Tensor]:
    """Return the features of some of the samples, index int64 [n]; the teacher's head is one for all."""
    return {feature: rows if feature.is_head else rows[index] for feature, rows in features.items()}


def head_logits(vectors: Tensor, head: Tensor) -> Tensor:
    """Compute the logits [B, C] of pooled vectors [B, D] with a teacher's head [C, D + 1], in float32 on any device."""
    with torch.autocast(vectors.device.type, enabled=False), tf32(enabled=False):
        return torch.addmm(head[:, -1], vectors, head[:, :-1].T)


@dataclass(frozen=True)
class DenseTargets:
    """Teacher outputs with all logits, [B, num_classes]: the same at any temperature; None for embeddings alone."""

    logits: Tensor | None
    features: Mapping[FeatureSpec, Tensor]

    def logits_at(self, temperature: float) -> Tensor:
        if self.logits is None:
            raise RecipeError(NO_LOGITS)
        return self.logits

    def rows(self, index: Tensor) -> DenseTargets:
        logits = None if self.logits is None else self.logits[index]
        return DenseTargets(logits, feature_rows(self.features, index))


@dataclass(frozen=True)
class TopKTargets:
    """Top-k logits of a batch.

    Attributes:
        values, indices: The largest logits and their classes, [B, k].
        tail: Log-odds of the rest, [B, num_temperatures].
        rest: Logits [B, num_classes] that the mass of the rest is spread by; None for an equal share of each class.
    """

    top_k: TopK
    values: Tensor
    indices: Tensor
    tail: Tensor
    features: Mapping[FeatureSpec, Tensor]
    rest: Tensor | None = None

    def rows(self, index: Tensor) -> TopKTargets:
        features, rest = feature_rows(self.features, index), None if self.rest is None else self.rest[index]
        return TopKTargets(self.top_k, self.values[index], self.indices[index], self.tail[index], features, rest)

    def with_rest_of(self, logits: Tensor) -> TopKTargets:
        """Return the same with the mass of the rest spread as in these logits [B, num_classes], without gradient.

        A divergence then compares the kept classes and the sum of all others.
        """
        return replace(self, rest=logits.detach().float())

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, for a softmax at `temperature`.

        The k largest are as stored. All others have the total probability that they had, in equal shares or as `rest`.

        Raises:
            StoreError: The temperature is outside the store's range.
        """
        kept = self.values.float()
        weights = torch.from_numpy(interpolation(self.top_k, temperature)).float().to(kept.device, non_blocking=True)
        log_odds = self.tail.float() @ weights
        rest = torch.logsumexp(kept / temperature, 1) + log_odds
        if self.rest is None:
            rest = rest - math.log(self.top_k.num_classes - self.top_k.k)
            dense = (temperature * rest)[:, None].repeat(1, self.top_k.num_classes)
        else:
            others = (self.rest / temperature).scatter(1, self.indices.long(), -math.inf)
            dense = temperature * (rest[:, None] + others.log_softmax(1))
        return dense.scatter(1, self.indices.long(), kept)


@dataclass(frozen=True)
class TransformedTargets:
    """Outputs of a teacher with a function of (logits, temperature) applied to its logits."""

    inner: TeacherTargets
    transform: Callable[[Tensor, float], Tensor]

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        return self.inner.features

    def logits_at(self, temperature: float) -> Tensor:
        return self.transform(self.inner.logits_at(temperature), temperature)

    def rows(self, index: Tensor) -> TransformedTargets:
        return TransformedTargets(self.inner.rows(index), self.transform)
