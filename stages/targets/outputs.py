"""Outputs of a teacher for a batch: dense or top-k logits, and features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdpipe.stages.models.hooks import rows_of
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import TopK, interpolation


class TeacherTargets(Protocol):
    """Outputs of a teacher for a batch, computed or read from a store."""

    @property
    def features(self) -> Mapping[FeatureSpec, Tensor]:
        """Return the required features, [B, ...]."""

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, that are exact in a softmax at `temperature`."""

    def rows(self, index: Tensor) -> TeacherTargets:
        """Return the outputs for some of the samples, index int64 [n]."""


@dataclass(frozen=True)
class DenseTargets:
    """Teacher outputs with all logits, [B, num_classes]: the same at any temperature."""

    logits: Tensor
    features: Mapping[FeatureSpec, Tensor]

    def logits_at(self, temperature: float) -> Tensor:
        return self.logits

    def rows(self, index: Tensor) -> DenseTargets:
        return DenseTargets(self.logits[index], rows_of(self.features, index))


@dataclass(frozen=True)
class TopKTargets:
    """Top-k logits of a batch: values and indices [B, k], log-odds of the tail [B, num_temperatures]."""

    top_k: TopK
    values: Tensor
    indices: Tensor
    tail: Tensor
    features: Mapping[FeatureSpec, Tensor]

    def rows(self, index: Tensor) -> TopKTargets:
        features = rows_of(self.features, index)
        return TopKTargets(self.top_k, self.values[index], self.indices[index], self.tail[index], features)

    def logits_at(self, temperature: float) -> Tensor:
        """Return logits [B, num_classes], float32, for a softmax at `temperature`.

        The k largest are as stored, all others are equal, with the total probability that they had.

        Raises:
            StoreError: The temperature is outside the store's range.
        """
        kept = self.values.float()
        weights = torch.from_numpy(interpolation(self.top_k, temperature)).float().to(kept.device)
        log_odds = self.tail.float() @ weights
        rest = torch.logsumexp(kept / temperature, 1) + log_odds - math.log(self.top_k.num_classes - self.top_k.k)
        dense = (temperature * rest)[:, None].repeat(1, self.top_k.num_classes)
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
