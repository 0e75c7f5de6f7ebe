"""How good a network is: accuracy and cross entropy over a test set, in eval mode, without views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.lesson import Normalisation

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """A test set: images uint8 [N, C, H, W], labels int64 [N], and how the model under test scales its input."""

    images: Tensor
    labels: Tensor
    normalise: Normalisation


@dataclass(frozen=True)
class Measured:
    """Share of samples whose largest logit is their label's, and mean cross entropy in nats."""

    accuracy: float
    cross_entropy: float

    def to_json(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "cross_entropy": self.cross_entropy}


@torch.no_grad()
def evaluate(model: nn.Module, test: Evaluation, device: torch.device) -> Measured:
    """Measure `model`; it is left in the mode in which it was."""
    was_training = model.training
    model.eval()
    num_correct, total = 0, 0.0
    for start in range(0, len(test.labels), BATCH_SIZE):
        images = test.normalise(test.images[start : start + BATCH_SIZE].to(device))
        labels = test.labels[start : start + BATCH_SIZE].to(device)
        logits = model(images).float()
        num_correct += int((logits.argmax(1) == labels).sum())
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
    model.train(was_training)
    return Measured(num_correct / len(test.labels), total / len(test.labels))
