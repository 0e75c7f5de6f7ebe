"""Evaluation: the main metric and the cross entropy over a test set, in eval mode, without views.

Where no test image has a label, the classes that the teacher predicts take the place of the labels. A network that
returns embeddings is compared with the teacher's, whether there are labels or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.compute.settings import EXACT, ComputeSettings
from kdpipe.stages.compute.threads import CheckedThreads, max_threads
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.data.measures import mean_average_precision, r2, target_losses
from kdpipe.stages.data.tasks import CLASSIFICATION, EMBEDDING, LOSS_NAMES, MULTILABEL, Task
from kdpipe.stages.errors import DataError, NotFiniteError
from kdpipe.stages.evaluation.knn import mutual_knn
from kdpipe.stages.evaluation.main_metric import ACCURACY, DECISIONS, MAP, MUTUAL_KNN, MainMetric, metric_for
from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.main_logits import main_logits
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.memory import run_in_chunks

BATCH_SIZE = 500
MAX_PIXELS = BATCH_SIZE * 96**2
"""Pixels of a batch: 500 images of 224 x 224 took 9 GB with EfficientNet-Lite0, the 91 that these are take 1.5 GB."""

_threads: WeakKeyDictionary[nn.Module, CheckedThreads] = WeakKeyDictionary()
"""Where the logits do not depend on the number of CPU threads, a network runs on the one that is faster at present."""

LogitsAt = Callable[[Tensor], Tensor]
"""Returns a teacher's logits, float32 [B, C], or embeddings, of the samples at positions int64 [B] of a test set."""


def in_batches(indices: Tensor, loader: ImageLoader) -> tuple[Tensor, ...]:
    """Split the indices of images, int64 [N], into batches that a network is evaluated on: fewer of large images."""
    height, width = loader.image_size or (1, 1)
    return torch.split(indices, max(1, min(BATCH_SIZE, MAX_PIXELS // (height * width))))


@dataclass(frozen=True)
class Evaluation:
    """A test set, the model's input scaling, and the teacher's logits.

    Attributes:
        teacher_logits: Reads the teacher's logits; rows of NaN for samples without any; None without a teacher. With
            `of_embeddings` they are its embeddings.
        warn: Receives a sentence about batches that did not fit into memory.
        before_batch: Called before each batch; may raise StoppedEarly, as a large test set takes minutes.
        compute: How the network is computed.
        view: The view of the images that is evaluated; None for the original images.
        head: What makes logits of the network's outputs, if these are embeddings.
        of_embeddings: Whether networks return embeddings, which are compared with the teacher's.
    """

    loader: ImageLoader
    normalize: Normalization
    teacher_logits: LogitsAt | None = None
    warn: Callable[[str], None] | None = None
    before_batch: Callable[[], None] = lambda: None
    compute: ComputeSettings = EXACT
    view: int | None = None
    head: Callable[[Tensor], Tensor] | None = None
    of_embeddings: bool = False

    @property
    def device(self) -> torch.device:
        return self.loader.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the test images, which is the network's input shape."""
        size = self.loader.image_size
        assert size is not None, "test images are all of one size"
        return self.loader.dataset.in_channels, *size

    @property
    def crop(self) -> float:
        """The share of the centered square that test images were cropped to before they were resized."""
        return self.loader.dataset.crop

    @cached_property
    def metric(self) -> MainMetric:
        """What a network is judged by: without a single label, its agreement with the teacher."""
        return metric_for(self.task, has_labels=self.loader.dataset.has_labels)

    @property
    def task(self) -> Task:
        """What the images are labeled with, or that embeddings are compared."""
        return EMBEDDING if self.of_embeddings else self.loader.dataset.task

    @property
    def is_whole(self) -> bool:
        """Whether it is known of every image what is expected."""
        return self.loader.dataset.is_labeled and not self.of_embeddings

    def expected(self, positions: Tensor) -> Tensor:
        """Return the class that each sample should have, int64 [B], -1 where that is not known.

        Of other tasks than classification they are labels or numbers, float32 [B, K], NaN where not known; of
        embeddings those of the teacher.

        Raises:
            DataError: The test images have no labels, or embeddings are compared, and no teacher's outputs are known.
        """
        if self.loader.dataset.has_labels and not self.of_embeddings:
            return self.loader.dataset.labels_at(positions)
        if self.teacher_logits is None and self.of_embeddings:
            raise DataError(
                f"there are no embeddings of the teacher for the {self.loader.dataset.split} images of "
                f"{self.loader.dataset.name} to compare the student's with: cache the teacher on them (kdpipe "
                "cache-teacher, in Python test=)."
            )
        if self.teacher_logits is None:
            raise DataError(
                f"the {self.loader.dataset.split} images of {self.loader.dataset.name} have no labels, and there are "
                "no outputs of the teacher for them to compare a network with: give some of them labels, or cache the "
                "teacher on them (kdpipe cache-teacher, in Python test_set=)."
            )
        logits = self.teacher_logits(positions).cpu()
        if self.task == MULTILABEL:
            return torch.where(logits.isnan(), logits, (logits > 0).float())
        if self.task != CLASSIFICATION:
            return logits
        return torch.where(logits.isnan().any(1), UNLABELED, logits.argmax(1))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; none of embeddings."""
        return () if self.of_embeddings else tuple(self.loader.dataset.class_names)

    def images(self, limit: int) -> Tensor:
        """Return the first images, at most `limit`, normalized: float32 [B, C, H, W]."""
        indices = torch.arange(min(limit, self.loader.dataset.num_samples))
        return self.normalize(self.loader.get(ViewRequest(indices)).images)

    def batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first images, or all, normalized: float32 [B, C, H, W], with their classes int64 [B], on CPU."""
        image_set = self.loader.dataset
        indices = torch.arange(image_set.num_samples)[:limit]
        for image_batch in self.loader.stream(ViewRequest(some) for some in in_batches(indices, self.loader)):
            self.before_batch()
            yield self.normalize(image_batch.images.cpu()), image_set.labels[image_batch.indices]


@dataclass(frozen=True)
class Predictions:
    """A model's logits float32 [B, C] of a batch and the labels int64 [B], on the device; positions int64 [B].

    The labels are the classes that were expected, -1 where that is not known; or labels or numbers, float32 [B, K].
    """

    positions: Tensor
    labels: Tensor
    logits: Tensor

    @property
    def labeled(self) -> Predictions:
        """Those with a label."""
        kept = ~self.labels.isnan().all(1) if self.labels.is_floating_point() else self.labels != UNLABELED
        return Predictions(self.positions[kept.cpu()], self.labels[kept], self.logits[kept])


@dataclass(frozen=True)
class EvalResult:
    """Top-1 accuracy, or what takes its place, and the mean loss: cross entropy in nats, or a squared error."""

    value: float
    loss: float
    metric: MainMetric = ACCURACY
    task: Task = CLASSIFICATION

    def to_json(self) -> dict[str, Any]:
        return {**self.metric.record(self.value), LOSS_NAMES[self.task]: self.loss}


@dataclass
class EvalAccumulator:
    """Running sums of a pass over a test set, kept on the device."""

    metric: MainMetric
    num_correct: Tensor | int = 0
    num_seen: int = 0
    total: Tensor | float = 0.0

    def add(self, predictions: Predictions) -> None:
        self.num_correct += (predictions.logits.argmax(1) == predictions.labels).sum()
        self.num_seen += len(predictions.labels)
        self.total += F.cross_entropy(predictions.logits, predictions.labels, reduction="sum").double()

    def result(self) -> EvalResult:
        if not self.num_seen:
            raise DataError("the teacher has no outputs for any of the unlabeled test images: cache it on them.")
        return EvalResult(int(self.num_correct) / self.num_seen, float(self.total) / self.num_seen, self.metric)


@dataclass
class OutputAccumulator:
    """The outputs of a pass over a test set that has labels or numbers, or of embeddings, on the CPU."""

    task: Task
    metric: MainMetric
    outputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def add(self, predictions: Predictions) -> None:
        self.outputs.append(predictions.logits.cpu())
        self.targets.append(predictions.labels.cpu())

    def result(self) -> EvalResult:
        outputs, targets = torch.cat(self.outputs), torch.cat(self.targets)
        if self.metric is MUTUAL_KNN:
            shares, loss = mutual_knn(targets, outputs)
            return EvalResult(float(shares.double().mean()), loss, self.metric, self.task)
        if self.metric is MAP:
            value = mean_average_precision(targets, outputs)[0]
        elif self.metric is DECISIONS:
            value = float(((outputs > 0) == (targets == 1)).double().mean())
        else:
            value = r2(targets, outputs)
        loss = float(target_losses(self.task, outputs, targets).double().mean())
        return EvalResult(value, loss, self.metric, self.task)


@torch.no_grad()
def predict(model: nn.Module, test: Evaluation, device: torch.device) -> Iterator[Predictions]:
    """Yield the model's predictions on the test set, batch by batch; the modes of its modules are restored.

    An unreadable test image raises DataError, or is left out of its batch, as configured in `test.loader`. A batch
    that does not fit into memory is halved until it does: its logits then differ by rounding.
    """
    image_set = test.loader.dataset
    every = in_batches(torch.arange(image_set.num_samples), test.loader)
    requests = (ViewRequest(indices, test.view) for indices in every)
    with preserve_modes(model):
        model.eval()
        for image_batch in test.loader.stream(requests):
            test.before_batch()
            labels = test.expected(image_batch.indices).to(device, non_blocking=True)
            yield Predictions(image_batch.indices, labels, _logits(model, test, image_batch.images))


def _logits(model: nn.Module, test: Evaluation, images: Tensor) -> Tensor:
    """Return the model's logits, float32 [B, num_classes], of images uint8 [B, C, H, W]."""

    def logits_of(rows: slice) -> Tensor:
        def compute() -> Tensor:
            with test.compute.active(images.device):
                output = model(test.compute.place_images(test.normalize(images[rows])))
                return main_logits(output).float()  # type: ignore[no-any-return]

        if images.device.type != "cpu" or test.compute.compile:
            return compute()
        threads = _threads.setdefault(model, CheckedThreads(max_threads()))
        return threads.run_checked((*images[rows].shape, test.compute), compute, lambda logits: [logits])

    chunks = list(run_in_chunks(model, len(images), logits_of, test.warn))
    outputs = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
    return outputs if test.head is None else test.head(outputs)


def of_teacher(test: Evaluation, model: nn.Module) -> Evaluation:
    """Return the evaluation of a teacher: compared with itself if no test image has a label, or it has embeddings."""
    if test.loader.dataset.has_labels and not test.of_embeddings:
        return test

    @torch.no_grad()
    def logits_at(positions: Tensor) -> Tensor:
        return _logits(model, test, test.loader.get(ViewRequest(positions)).images)

    return replace(test, teacher_logits=logits_at)


def evaluate(model: nn.Module, test: Evaluation, device: torch.device) -> EvalResult:
    """Evaluate `model`, restoring its mode; raises NotFiniteError if the loss is not finite."""
    (result,) = evaluate_all(model, test, device, 1)
    return result


def evaluate_all(model: nn.Module, test: Evaluation, device: torch.device, count: int) -> list[EvalResult]:
    """Evaluate `count` networks whose outputs `model` returns side by side, [B, count C]; raises like `evaluate`."""
    sums = [
        EvalAccumulator(test.metric) if test.task == CLASSIFICATION else OutputAccumulator(test.task, test.metric)
        for _ in range(count)
    ]
    for predictions in predict(model, test, device):
        if not predictions.logits.isfinite().all() and test.task != CLASSIFICATION:
            raise _not_finite("outputs are NaN or infinite")
        labeled = predictions if test.is_whole else predictions.labeled
        for each, logits in zip(sums, labeled.logits.chunk(count, 1), strict=True):
            each.add(replace(labeled, logits=logits))
    results = [each.result() for each in sums]
    for result in results:
        if not math.isfinite(result.loss):
            raise _not_finite(f"cross entropy over the test set is {result.loss}")
    return results


def _not_finite(what: str) -> NotFiniteError:
    return NotFiniteError(
        f"the network's {what}: its weights or batch-norm statistics are not finite, or too large. Lower lr, or give "
        "weights of a trained network."
    )
