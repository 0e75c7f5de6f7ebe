"""In-depth evaluation of a finished job: accuracy, calibration, confusions and agreement with the teacher.

All metrics come from one pass over the test set. They are accumulated on the CPU, in integers and float64, so that they
are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.data.image_set import UNLABELED, ImageSet
from kdpipe.stages.data.measures import agreement, divergences, mean_average_precision
from kdpipe.stages.data.tasks import CLASSIFICATION, EMBEDDING, LOSS_NAMES, MULTILABEL, Task
from kdpipe.stages.evaluation.bootstrap import bootstrap_interval
from kdpipe.stages.evaluation.correct_images import CorrectImages, pack
from kdpipe.stages.evaluation.evaluate import EvalAccumulator, Evaluation, OutputAccumulator, Predictions, predict
from kdpipe.stages.evaluation.knn import num_compared
from kdpipe.stages.evaluation.main_metric import ACCURACY, MainMetric
from kdpipe.stages.numerics import kinds_of_outputs

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
        top1: Share of labeled samples whose label has the largest logit. Where no sample has a label, the teacher's
            classes stand for the labels here and below, and what needs true ones is left out.
        top5: Share of samples whose label is among the five largest logits; None below six classes.
        loss: Mean cross entropy, nats; of numbers the squared error.
        ece: Expected calibration error, the sum over bins of share * |accuracy - confidence|; the confidence is the
            largest softmax (arXiv 1706.04599, equation 3). None without labels.
        agreement: Share of samples with teacher logits on which network and teacher agree; None without any.
        teacher_kl: Mean KL(p_teacher || p_network) at temperature 1 over these samples, nats.
        per_class: Metrics of each class; none without labels.
        bins: The bins of `ece`, from confidence 0 to 1; None if a confidence is NaN, or without labels.
        confusions: [label, prediction, samples] of wrong predictions, sorted by label and prediction; none without
            labels.
        chance: The accuracy of guessing with the frequencies of these predictions; that of a network which returns the
            same class for every image is its accuracy.
        outputs: "logits", or what else the network's outputs are: "probabilities" or "log-probabilities".
        correct: Which images were classified correctly; None where they have no classes.
        metric: What top1 is.
        task: What the images are labeled with. Of labels and numbers, `agreement` and `teacher_kl` compare with the
            teacher's as `kdpipe.stages.data.measures` says (of numbers R², and no KL); what needs classes is left out,
            and of embeddings, which top1 compares with the teacher's, this too.
        average_precision: That of each label, None if no test sample has it; of labels only.
        interval: The 95 % confidence interval of top1 by the bootstrap, of other tasks than classification.
    """

    top1: float
    top5: float | None
    loss: float
    ece: float | None
    agreement: float | None
    teacher_kl: float | None
    per_class: list[ClassMetrics]
    bins: list[CalibrationBin] | None
    confusions: list[list[int]]
    chance: float
    outputs: str
    correct: CorrectImages | None
    metric: MainMetric = ACCURACY
    task: Task = CLASSIFICATION
    num_samples: int = 0
    average_precision: Mapping[str, float | None] | None = None
    interval: tuple[float, float] | None = None

    def is_at_chance(self, num_errors: float = 2.0) -> bool:
        """Return whether the accuracy is not above chance by more than `num_errors` standard errors.

        It is not if there are too few samples to tell: if an accuracy half-way between chance and 1 could be missed.
        """
        if not self.metric.is_share:
            return self.top1 <= self.chance
        error = math.sqrt(self.chance * (1 - self.chance) / self.num_samples)
        if 2 * num_errors * error >= (1 - self.chance) / 2:
            return False
        return self.top1 <= self.chance + num_errors * error

    def to_json(self) -> dict[str, Any]:
        figures = {LOSS_NAMES[self.task] if key == "loss" else key: value for key, value in asdict(self).items()}
        left_out = ["metric", "num_samples", "task", "average_precision", "interval"]
        if self.task != CLASSIFICATION:
            left_out = ["metric"] if self.task == MULTILABEL else ["metric", "average_precision"]
        return {key: value for key, value in figures.items() if key not in left_out}


def evaluate_in_depth(model: nn.Module, test: Evaluation, device: torch.device) -> EvalReport:
    """Evaluate `model` on the test set, restoring its mode.

    top1 and loss equal those of `evaluate` bit for bit.
    """
    image_set = test.loader.dataset
    if test.task != CLASSIFICATION:
        return _evaluate_targets(model, test, device)
    metrics = _MetricAccumulator(test)
    for predictions in predict(model, test, device):
        metrics.add(predictions)
    return metrics.report(image_set)


def _evaluate_targets(model: nn.Module, test: Evaluation, device: torch.device) -> EvalReport:
    """Evaluate a network whose outputs are labels, numbers or embeddings."""
    sums = OutputAccumulator(test.task, test.metric)
    outputs, teacher = [], []
    for predictions in predict(model, test, device):
        sums.add(predictions if test.is_whole else predictions.labeled)
        if test.teacher_logits is not None and not test.of_embeddings:
            outputs.append(predictions.logits.cpu())
            teacher.append(test.teacher_logits(predictions.positions).cpu())
    result, targets = sums.result(), torch.cat(sums.targets)
    precision = mean_average_precision(targets, torch.cat(sums.outputs))[1] if test.task == MULTILABEL else []
    with_teacher = None
    if teacher:
        rows = ~torch.cat(teacher).isnan().any(1)
        with_teacher = torch.cat(teacher)[rows], torch.cat(outputs)[rows]
    return EvalReport(
        top1=result.value,
        top5=None,
        loss=result.loss,
        ece=None,
        agreement=agreement(test.task, *with_teacher) if with_teacher else None,
        teacher_kl=float(divergences(MULTILABEL, *with_teacher).mean()) if precision and with_teacher else None,
        per_class=[],
        bins=None,
        confusions=[],
        chance=_chance_of_outputs(test.task, targets),
        outputs={MULTILABEL: "logits", EMBEDDING: "embeddings"}.get(test.task, "numbers"),
        correct=None,
        metric=test.metric,
        task=test.task,
        num_samples=len(targets),
        interval=bootstrap_interval(test.metric, targets, torch.cat(sums.outputs)),
        average_precision=dict(zip(test.class_names, precision, strict=True)) if precision else None,
    )


def _chance_of_outputs(task: Task, targets: Tensor) -> float:
    """Return what guessing would reach: of labels how often they are there, of neighbors what random ones share."""
    if task == EMBEDDING:
        num, k = num_compared(len(targets))
        return k / max(num - 1, 1)
    return float((targets == 1).double().mean()) if task == MULTILABEL else 0.0


class _MetricAccumulator(EvalAccumulator):
    """Running sums, and the position, label, prediction and confidence of each sample so far.

    The tensors are allocated at once: small ones between large temporary ones would fragment memory.
    """

    def __init__(self, test: Evaluation) -> None:
        super().__init__(test.metric)
        num_samples, self.teacher_logits = test.loader.dataset.num_samples, test.teacher_logits
        self.is_whole = test.is_whole
        self.positions, self.labels, self.predicted = torch.zeros(3, num_samples, dtype=torch.int64)
        self.confidences = torch.zeros(num_samples, dtype=torch.float64)
        self.kinds: frozenset[str] | None = None
        self.num_in_top5 = self.num_compared = self.num_agreed = 0
        self.kl_sum = 0.0

    def add(self, predictions: Predictions) -> None:
        log_p = F.log_softmax(predictions.logits.cpu().double(), dim=1)
        kinds = kinds_of_outputs(predictions.logits.cpu())
        self.kinds = kinds if self.kinds is None else self.kinds & kinds
        if self.teacher_logits is not None:
            self._compare(predictions.logits.argmax(1).cpu(), log_p, self.teacher_logits(predictions.positions).cpu())
        if not self.is_whole:
            log_p, predictions = log_p[(predictions.labels != UNLABELED).cpu()], predictions.labeled
        new = slice(self.num_seen, self.num_seen + len(predictions.labels))
        super().add(predictions)
        logits, labels = predictions.logits.cpu(), predictions.labels.cpu()
        self.positions[new], self.labels[new] = predictions.positions, labels
        self.predicted[new] = predictions.logits.argmax(1)
        self.confidences[new] = log_p.amax(1).exp()
        if logits.shape[1] >= MIN_CLASSES_FOR_TOP5:
            self.num_in_top5 += int((logits.topk(5).indices == labels[:, None]).sum())

    def _compare(self, predicted: Tensor, log_p: Tensor, teacher: Tensor) -> None:
        """Compare the network's classes [B] and log-probabilities float64 [B, C] with the teacher's logits [B, C]."""
        has_teacher = ~teacher.isnan().any(1)
        p_teacher = teacher[has_teacher].double().softmax(1)
        self.num_compared += len(p_teacher)
        self.num_agreed += int((predicted[has_teacher] == teacher[has_teacher].argmax(1)).sum())
        # Rounding makes the sum slightly negative for equal networks.
        self.kl_sum += float(F.kl_div(log_p[has_teacher], p_teacher, reduction="sum").clamp(min=0))

    def report(self, image_set: ImageSet) -> EvalReport:
        class_names = image_set.class_names
        seen, num_classes = slice(self.num_seen), len(class_names)
        labels, predicted = self.labels[seen], self.predicted[seen]
        # A confidence of 1 belongs to the last bin.
        confidences = self.confidences[seen].clamp(max=1 - torch.finfo(torch.float64).eps)
        correct, result, is_true = predicted == labels, self.result(), self.metric == ACCURACY
        counts = torch.stack([torch.bincount(some, minlength=num_classes) for some in (labels[correct], labels)], 1)
        bins = _bins(confidences, correct) if is_true else None
        return EvalReport(
            top1=result.value,
            top5=self.num_in_top5 / self.num_seen if num_classes >= MIN_CLASSES_FOR_TOP5 else None,
            loss=result.loss,
            ece=_calibration_error(bins) if is_true else None,
            agreement=self.num_agreed / self.num_compared if self.num_compared else None,
            teacher_kl=self.kl_sum / self.num_compared if self.num_compared else None,
            per_class=[
                ClassMetrics(name, right / num if num else None, num)
                for name, (right, num) in zip(class_names, counts.tolist(), strict=True)
                if is_true
            ],
            bins=bins,
            confusions=_confusions(labels[~correct], predicted[~correct], num_classes) if is_true else [],
            chance=_chance(labels, predicted, num_classes),
            outputs=next(iter(self.kinds or ()), "logits"),
            correct=pack(correct, image_set.sample_ids[self.positions[seen]], labels),
            metric=self.metric,
            num_samples=self.num_seen,
        )


def _calibration_error(bins: Sequence[CalibrationBin] | None) -> float:
    """Return the mean over the samples of |accuracy - confidence| of their bins: Naeini et al. 2015."""
    gaps = [(one.num_samples, abs((one.accuracy or 0) - (one.confidence or 0))) for one in bins or ()]
    return sum(num * gap for num, gap in gaps) / sum(num for num, _ in gaps) if bins else math.nan


def _bins(confidences: Tensor, correct: Tensor) -> list[CalibrationBin] | None:
    if confidences.isnan().any():
        return None
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(confidences, edges, right=True) - 1
    counts, sums, hits = (
        torch.bincount(bins, weights, minlength=NUM_BINS).tolist() for weights in (None, confidences, correct.double())
    )
    return [
        CalibrationBin(num, confidence / num if num else None, num_correct / num if num else None)
        for num, confidence, num_correct in zip(counts, sums, hits, strict=True)
    ]


def _chance(labels: Tensor, predicted: Tensor, num_classes: int) -> float:
    """Return the share of samples that would be right if predictions had nothing to do with labels."""
    counts = [torch.bincount(some, minlength=num_classes).double() for some in (labels, predicted)]
    return float(counts[0] @ counts[1]) / len(labels) ** 2


def _confusions(labels: Tensor, predicted: Tensor, num_classes: int) -> list[list[int]]:
    """Return [label, prediction, samples] of the most frequent wrong predictions, sorted by label and prediction."""
    pairs, counts = torch.unique(labels * num_classes + predicted, return_counts=True)
    frequent = counts.sort(descending=True, stable=True).indices[:MAX_CONFUSIONS].sort().values
    return [[*divmod(pair, num_classes), num] for pair, num in torch.stack([pairs, counts], 1)[frequent].tolist()]
