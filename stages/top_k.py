"""Top-k logits from a store as tensors: rebuilt for the temperature at which a loss wants them."""

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
    """What a store with top-k logits says about a batch: values and indices [B, k], tail [B, num_temperatures]."""

    form: TopK
    values: Tensor
    indices: Tensor
    tail: Tensor
    features: Mapping[Wanted, Tensor]

    def rows(self, index: Tensor) -> TopKOutputs:
        """The same for some of the samples, int64 [n]."""
        features = rows_of(self.features, index)
        return TopKOutputs(self.form, self.values[index], self.indices[index], self.tail[index], features)

    def logits_at(self, temperature: float) -> Tensor:
        """Logits [B, num_classes], float32, right in a softmax at `temperature`: the kept ones as they were, the
        others all equal, with the mass that they had together. Raises StoreError outside the store's temperatures.
        """
        kept = self.values.float()
        weights = torch.from_numpy(interpolation(self.form, temperature)).float().to(kept.device)
        log_odds = self.tail.float() @ weights
        rest = torch.logsumexp(kept / temperature, 1) + log_odds - math.log(self.form.num_classes - self.form.k)
        dense = (temperature * rest)[:, None].repeat(1, self.form.num_classes)
        return dense.scatter(1, self.indices.long(), kept)
