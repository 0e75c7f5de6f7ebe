"""How good a network is: accuracy and cross entropy over a test set, in eval mode, without views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.lesson import Normalisation
from stages.pictures import Pictures, Request

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """A test set, and how the model under test scales its input."""

    pictures: Pictures
    normalise: Normalisation

    def images(self, most: int) -> Tensor:
        """The first images, at most so many, normalised: float32 [B, C, H, W]."""
        at = torch.arange(min(most, self.pictures.image_set.num_samples))
        return self.normalise(self.pictures.one(Request(at)).images)


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
    num_correct, num_seen, total = 0, 0, 0.0
    image_set = test.pictures.image_set
    for seen in test.pictures.stream(
        Request(at) for at in torch.split(torch.arange(image_set.num_samples), BATCH_SIZE)
    ):
        labels = image_set.labels[seen.positions].to(device)
        logits = model(test.normalise(seen.images)).float()
        num_correct += int((logits.argmax(1) == labels).sum())
        num_seen += len(labels)
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
    model.train(was_training)
    return Measured(num_correct / num_seen, total / num_seen)
