"""In-depth evaluation of a finished job: accuracy, calibration, confusions and agreement with the teacher.

All metrics come from one pass over the test set. They are accumulated on the CPU, in integers and float64, so that they
are reproducible.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.evaluation.evaluate import EvalAccumulator, EvalResult, Evaluation, Predictions, predict

NUM_BINS = 15
"""Bins of the calibration error, of equal width: Guo et al. 2017, arXiv 1706.04599."""

MIN_CLASSES_FOR_TOP5 = 6
"""With fewer classes the label is always among the five largest logits."""

MAX_CONFUSIONS = 10_000
"""The number of confusions that are kept, the most frequent: all of them up to a hundred classes."""


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of a class; accuracy is None if it has no test samples."""

    name: str
    accuracy: float | None
    num_samples: int


@dataclass(frozen=True)
class CalibrationBin:
    """A bin of the calibration error: mean confidence and accuracy of its samples, None if it has none."""

    num_samples: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class EvalReport:
    """Metrics over the readable test samples.

    Attributes:
        top1: Share of samples whose label has the largest logit.
        top5: Share of samples whose label is among the five largest logits; None below six classes.
        cross_entropy: Mean cross entropy, nats.
        ece: Expected calibration error, the sum over bins of share * |accuracy - confidence|; the confidence is the
            largest softmax (arXiv 1706.04599, equation 3).
        agreement: Share of samples with teacher logits on which network and teacher agree; None without any.
        teacher_kl: Mean KL(p_teacher || p_network) at temperature 1 over these samples, nats.
        per_class: Metrics of each class.
        bins: The bins of `ece`, from confidence 0 to 1; None if a confidence is NaN.
        confusions: [label, prediction, samples] of wrong predictions, sorted by label and prediction.
    """

    top1: float
    top5: float | None
    cross_entropy: float
    ece: float
    agreement: float | None
    teacher_kl: float | None
    per_class: list[ClassMetrics]
    bins: list[CalibrationBin] | None
    confusions: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_in_depth(model: nn.Module, test: Evaluation, device: torch.device) -> EvalReport:
    """Evaluate `model` on the test set, restoring its mode.

    top1 and cross_entropy equal those of `evaluate` bit for bit.
    """
    image_set = test.loader.dataset
    sums, metrics = EvalAccumulator(), _MetricAccumulator(image_set.num_samples, image_set.num_classes)
    for predictions in predict(model, test, device):
        sums.add(predictions)
        metrics.add(predictions, test.teacher_logits)
    return metrics.report(sums.result(), image_set.class_names)


@dataclass
class _MetricAccumulator:
    """Running counts of all metrics but accuracy and cross entropy.

    Attributes:
        confidences: The largest softmax of the first `num_seen` samples, float64. Allocated at once: small tensors
            between large temporary ones would fragment memory.
        correct: Whether it is the label's, int64.
        by_class: Correct samples and samples of each class, int64 [C, 2].
        wrong: The count of each wrong prediction, keyed by label * num_classes + prediction.
    """

    num_samples: int
    num_classes: int
    num_seen: int = 0
    in_top5: int = 0
    by_class: Tensor = field(init=False)
    confidences: Tensor = field(init=False)
    correct: Tensor = field(init=False)
    num_compared: int = 0
    num_agreed: int = 0
    kl_sum: float = 0.0
    wrong: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.by_class = torch.zeros(self.num_classes, 2, dtype=torch.int64)  # correct samples, samples
        self.confidences = torch.zeros(self.num_samples, dtype=torch.float64)
        self.correct = torch.zeros(self.num_samples, dtype=torch.int64)

    def add(self, predictions: Predictions, teacher_logits: Tensor | None) -> None:
        predicted, labels, logits = (
            predictions.logits.argmax(1).cpu(),
            predictions.labels.cpu(),
            predictions.logits.cpu(),
        )
        log_p = F.log_softmax(logits.double(), dim=1)
        here = slice(self.num_seen, self.num_seen + len(labels))
        self.confidences[here], self.correct[here] = log_p.amax(1).exp(), (predicted == labels).long()
        self.num_seen = here.stop
        self._count(logits, predicted, labels)
        self.wrong.update((labels * self.num_classes + predicted)[predicted != labels].tolist())
        if teacher_logits is not None:
            self._compare(predicted, log_p, teacher_logits[predictions.positions].cpu())

    def _count(self, logits: Tensor, predicted: Tensor, labels: Tensor) -> None:
        from torchmetrics.functional.classification import multiclass_stat_scores as scores

        # Counts, since shares of batches of unequal size do not add up. samplewise with a batch as one sample gives the
        # counts of "global" without its confusion matrix of num_classes ** 2.
        settings: dict[str, Any] = {"num_classes": self.num_classes, "validate_args": False}
        found = scores(predicted[None], labels[None], average="none", multidim_average="samplewise", **settings)[0]
        self.by_class += found[:, [0, 4]]  # true positives, support
        if self.num_classes >= MIN_CLASSES_FOR_TOP5:
            self.in_top5 += int(scores(logits, labels, top_k=5, average="micro", **settings)[0])

    def _compare(self, predicted: Tensor, log_p: Tensor, teacher: Tensor) -> None:
        """Compare the network's classes [B] and log-probabilities float64 [B, C] with the teacher's logits [B, C]."""
        has_teacher = ~teacher.isnan().any(1)
        p_teacher = teacher[has_teacher].double().softmax(1)
        self.num_compared += len(p_teacher)
        self.num_agreed += int((predicted[has_teacher] == teacher[has_teacher].argmax(1)).sum())
        # Rounding makes the sum slightly negative for equal networks.
        self.kl_sum += float(F.kl_div(log_p[has_teacher], p_teacher, reduction="sum").clamp(min=0))

    def _ece(self) -> float:
        from torchmetrics.functional.classification import binary_calibration_error

        confidences, correct = self._clamped()
        if confidences.isnan().any():
            return math.nan
        # On confidences the binary function equals the multiclass one, without its [N, C] logits.
        return float(binary_calibration_error(confidences, correct, NUM_BINS, "l1", validate_args=False))

    def _clamped(self) -> tuple[Tensor, Tensor]:
        """Return confidences float64 [N] and correct int64 [N]; a confidence of 1 belongs to the last bin."""
        below_one = 1 - torch.finfo(torch.float64).eps
        return self.confidences[: self.num_seen].clamp(max=below_one), self.correct[: self.num_seen]

    def _bins(self) -> list[CalibrationBin] | None:
        confidences, correct = self._clamped()
        if confidences.isnan().any():
            return None
        edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)  # as in torchmetrics
        bins = torch.bucketize(confidences, edges, right=True) - 1
        counts = torch.bincount(bins, minlength=NUM_BINS).tolist()
        sums = torch.bincount(bins, confidences, minlength=NUM_BINS).tolist()
        hits = torch.bincount(bins, correct.double(), minlength=NUM_BINS).tolist()
        return [
            CalibrationBin(num, confidence / num if num else None, num_correct / num if num else None)
            for num, confidence, num_correct in zip(counts, sums, hits, strict=True)
        ]

    def _confusions(self) -> list[list[int]]:
        frequent = sorted(self.wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_CONFUSIONS]
        return [[*divmod(pair, self.num_classes), num] for pair, num in sorted(frequent)]

    def report(self, result: EvalResult, names: tuple[str, ...]) -> EvalReport:
        counts = zip(names, self.by_class.tolist(), strict=True)
        return EvalReport(
            top1=result.accuracy,
            top5=self.in_top5 / self.num_seen if self.num_classes >= MIN_CLASSES_FOR_TOP5 else None,
            cross_entropy=result.cross_entropy,
            ece=self._ece(),
            agreement=self.num_agreed / self.num_compared if self.num_compared else None,
            teacher_kl=self.kl_sum / self.num_compared if self.num_compared else None,
            per_class=[ClassMetrics(name, right / num if num else None, num) for name, (right, num) in counts],
            bins=self._bins(),
            confusions=self._confusions(),
        )
