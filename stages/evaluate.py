"""How good a network is: accuracy and cross entropy over a test set, in eval mode, without views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import NotFiniteError
from stages.halving import in_parts
from stages.lesson import Normalisation
from stages.pictures import Pictures, Request

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """A test set, how the model under test scales its input, and what the teacher says of it.

    teacher_logits: float32 [num_samples, C], in the order of the test set; rows of NaN for samples of which the teacher
    was not asked; None without a teacher. warn: is told, in a sentence, of batches that did not fit into memory.
    before_batch: is called before each batch, and may raise StoppedEarly: a pass over a large test set takes minutes.
    """

    pictures: Pictures
    normalise: Normalisation
    teacher_logits: Tensor | None = None
    warn: Callable[[str], None] | None = None
    before_batch: Callable[[], None] = lambda: None

    def images(self, most: int) -> Tensor:
        """The first images, at most so many, normalised: float32 [B, C, H, W]."""
        at = torch.arange(min(most, self.pictures.image_set.num_samples))
        return self.normalise(self.pictures.one(Request(at)).images)

    def batches(self, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The first images, or all of them, normalised: float32 [B, C, H, W], with their labels int64 [B]."""
        image_set = self.pictures.image_set
        at = torch.arange(image_set.num_samples if most is None else min(most, image_set.num_samples))
        for seen in self.pictures.stream(Request(some) for some in torch.split(at, BATCH_SIZE)):
            self.before_batch()
            yield self.normalise(seen.images), image_set.labels[seen.positions]


@dataclass(frozen=True)
class Answers:
    """What a model says of a batch: logits float32 [B, C] and the labels int64 [B], on the device; and where the
    samples stand in the test set, int64 [B].
    """

    positions: Tensor
    labels: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Measured:
    """Share of samples whose largest logit is their label's, and mean cross entropy in nats."""

    accuracy: float
    cross_entropy: float

    def to_json(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "cross_entropy": self.cross_entropy}


@dataclass
class Measuring:
    """The sums of a pass over a test set, as far as it has come."""

    num_correct: int = 0
    num_seen: int = 0
    total: float = 0.0

    def add(self, answers: Answers) -> None:
        self.num_correct += int((answers.logits.argmax(1) == answers.labels).sum())
        self.num_seen += len(answers.labels)
        self.total += float(F.cross_entropy(answers.logits, answers.labels, reduction="sum"))

    def measured(self) -> Measured:
        return Measured(self.num_correct / self.num_seen, self.total / self.num_seen)


@torch.no_grad()
def answers_of(model: nn.Module, test: Evaluation, device: torch.device) -> Iterator[Answers]:
    """What `model` says of the test set, batch by batch; it is left in the mode in which it was.

    A test image that cannot be read is a DataError, or missing from its batch, as the test set's pictures have it.
    A batch that does not fit into memory is halved until it does: its logits differ from the whole's by rounding.
    """
    was_training = model.training
    model.eval()
    image_set = test.pictures.image_set
    requests = (Request(at) for at in torch.split(torch.arange(image_set.num_samples), BATCH_SIZE))
    try:
        for seen in test.pictures.stream(requests):
            test.before_batch()
            labels = image_set.labels[seen.positions].to(device)
            yield Answers(seen.positions, labels, _logits(model, test, seen.images))
    finally:
        model.train(was_training)


def _logits(model: nn.Module, test: Evaluation, images: Tensor) -> Tensor:
    """What `model` says of images uint8 [B, C, H, W]: float32 [B, num_classes]."""

    def said(rows: slice) -> Tensor:
        logits: Tensor = model(test.normalise(images[rows])).float()
        return logits

    parts = list(in_parts(model, len(images), said, test.warn))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def evaluate(model: nn.Module, test: Evaluation, device: torch.device) -> Measured:
    """Measure `model`; it is left in the mode in which it was. Raises NotFiniteError where it answers with NaN."""
    sums = Measuring()
    for answers in answers_of(model, test, device):
        sums.add(answers)
    if not math.isfinite(sums.total):
        raise NotFiniteError(
            f"the network's cross entropy over the test set is {sums.total}: its weights, or the statistics of its "
            "batch norms, are no numbers, or too large. Lower lr, or give weights of a trained network."
        )
    return sums.measured()
