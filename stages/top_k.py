"""Teacher outputs from a store with top-k logits, reconstructed for a loss's temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.features import rows_of
from stages.forms import Wanted
from store import TopK, interpolation


@dataclass(frozen=True)
class TopKOutputs:
    """Top-k logits of a batch: values and indices [B, k], log-odds of the tail [B, num_temperatures]."""

    top_k: TopK
    values: Tensor
    indices: Tensor
    tail: Tensor
    features: Mapping[Wanted, Tensor]

    def rows(self, index: Tensor) -> TopKOutputs:
        """Return the outputs for some of the samples, index int64 [n]."""
        features = rows_of(self.features, index)
        return TopKOutputs(self.top_k, self.values[index], self.indices[index], self.tail[index], features)

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
