"""What a network has learnt, and what of it from its teacher: the figures of a finished job, in one pass over the test
set. They are counted and summed on the CPU, in integers and float64, so that they come out alike every time.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.evaluate import Answers, Evaluation, Measured, Measuring, answers_of

NUM_BINS = 15
"""Bins of the calibration error, of equal width: Guo et al. 2017, arXiv 1706.04599."""

FEWEST_CLASSES = 6
"""With fewer, the label is always among the five largest logits."""

MOST_CONFUSIONS = 10_000
"""So many pairs of a label and a wrong answer are kept, the most frequent: all there are up to a hundred classes."""


@dataclass(frozen=True)
class ClassFigures:
    """A class: the share of its test samples that are recognised, None where it has none."""

    name: str
    accuracy: float | None
    num_samples: int


@dataclass(frozen=True)
class BinFigures:
    """A bin of the calibration error: how many samples the network is so sure of, how sure on average, and the share of
    them that it gets right; None where there are none.
    """

    num_samples: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Examined:
    """Figures over the test samples that could be read.

    top1, top5: the share whose label is the largest logit, or among the five largest (None below six classes).
    cross_entropy: mean, nats. ece: the expected calibration error, sum over bins of share * |accuracy - confidence|,
    confidence being the largest softmax (arXiv 1706.04599, equation 3).
    agreement, teacher_kl: over the samples of which the teacher was asked, None where there is none: the share where
    its largest logit is the network's, and the mean of KL(p_teacher || p_network) at temperature 1, nats.
    bins: of ece, from confidence 0 to 1; None where a confidence is no number. confusions: [label, answer, samples] of
    the wrong answers, in the order of label and answer.
    """

    top1: float
    top5: float | None
    cross_entropy: float
    ece: float
    agreement: float | None
    teacher_kl: float | None
    per_class: list[ClassFigures]
    bins: list[BinFigures] | None
    confusions: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(model: nn.Module, test: Evaluation, device: torch.device) -> Examined:
    """Examine `model` on the test set; it is left in the mode in which it was.

    top1 and cross_entropy are to the bit what `evaluate` measures.
    """
    image_set = test.pictures.image_set
    sums, marks = Measuring(), _Marks(image_set.num_samples, image_set.num_classes)
    for answers in answers_of(model, test, device):
        sums.add(answers)
        marks.add(answers, test.teacher_logits)
    return marks.examined(sums.measured(), image_set.class_names)


@dataclass
class _Marks:
    """What is counted besides accuracy and cross entropy, as far as the pass has come.

    confidences, rights: of the first `num_seen` samples: the largest softmax, float64, and whether it is the label's,
    int64. In one piece from the start: small tensors kept between large ones that go would keep those in memory.
    wrong: how often each pair of a label and a wrong answer came, the pair as label * num_classes + answer.
    """

    num_samples: int
    num_classes: int
    num_seen: int = 0
    in_top5: int = 0
    by_class: Tensor = field(init=False)
    confidences: Tensor = field(init=False)
    rights: Tensor = field(init=False)
    num_taught: int = 0
    num_agreed: int = 0
    kl_sum: float = 0.0
    wrong: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.by_class = torch.zeros(self.num_classes, 2, dtype=torch.int64)  # samples recognised, samples
        self.confidences = torch.zeros(self.num_samples, dtype=torch.float64)
        self.rights = torch.zeros(self.num_samples, dtype=torch.int64)

    def add(self, answers: Answers, teacher_logits: Tensor | None) -> None:
        said, labels, logits = answers.logits.argmax(1).cpu(), answers.labels.cpu(), answers.logits.cpu()
        log_p = F.log_softmax(logits.double(), dim=1)
        here = slice(self.num_seen, self.num_seen + len(labels))
        self.confidences[here], self.rights[here] = log_p.amax(1).exp(), (said == labels).long()
        self.num_seen = here.stop
        self._count(logits, said, labels)
        self.wrong.update((labels * self.num_classes + said)[said != labels].tolist())
        if teacher_logits is not None:
            self._compare(said, log_p, teacher_logits[answers.positions].cpu())

    def _count(self, logits: Tensor, said: Tensor, labels: Tensor) -> None:
        from torchmetrics.functional.classification import multiclass_stat_scores as scores

        # Counts, since shares of batches of unequal size do not add up. samplewise with a batch as one sample: the same
        # counts as "global", whose confusion matrix would take num_classes ** 2.
        settings: dict[str, Any] = {"num_classes": self.num_classes, "validate_args": False}
        found = scores(said[None], labels[None], average="none", multidim_average="samplewise", **settings)[0]
        self.by_class += found[:, [0, 4]]  # true positives, support
        if self.num_classes >= FEWEST_CLASSES:
            self.in_top5 += int(scores(logits, labels, top_k=5, average="micro", **settings)[0])

    def _compare(self, said: Tensor, log_p: Tensor, teacher: Tensor) -> None:
        """`said` [B], log-probabilities float64 [B, C] of the network's, logits [B, C] of the teacher's."""
        taught = ~teacher.isnan().any(1)
        p_teacher = teacher[taught].double().softmax(1)
        self.num_taught += len(p_teacher)
        self.num_agreed += int((said[taught] == teacher[taught].argmax(1)).sum())
        # Of equal networks a rounded -1e-17 would come out.
        self.kl_sum += float(F.kl_div(log_p[taught], p_teacher, reduction="sum").clamp(min=0))

    def _ece(self) -> float:
        from torchmetrics.functional.classification import binary_calibration_error

        confidences, rights = self._sure_and_right()
        if confidences.isnan().any():
            return math.nan
        # Of confidences, the two-class function is the many-class one without its [N, C] logits.
        return float(binary_calibration_error(confidences, rights, NUM_BINS, "l1", validate_args=False))

    def _sure_and_right(self) -> tuple[Tensor, Tensor]:
        """Confidences float64 [N], rights int64 [N]; a 1 would get a bin of its own, where the last one is meant."""
        below_one = 1 - torch.finfo(torch.float64).eps
        return self.confidences[: self.num_seen].clamp(max=below_one), self.rights[: self.num_seen]

    def _bins(self) -> list[BinFigures] | None:
        confidences, rights = self._sure_and_right()
        if confidences.isnan().any():
            return None
        edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)  # as torchmetrics has them
        bins = torch.bucketize(confidences, edges, right=True) - 1
        counts = torch.bincount(bins, minlength=NUM_BINS).tolist()
        sure = torch.bincount(bins, confidences, minlength=NUM_BINS).tolist()
        right = torch.bincount(bins, rights.double(), minlength=NUM_BINS).tolist()
        return [
            BinFigures(num, one / num if num else None, hits / num if num else None)
            for num, one, hits in zip(counts, sure, right, strict=True)
        ]

    def _confusions(self) -> list[list[int]]:
        often = sorted(self.wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CONFUSIONS]
        return [[*divmod(pair, self.num_classes), num] for pair, num in sorted(often)]

    def examined(self, measured: Measured, names: tuple[str, ...]) -> Examined:
        counts = zip(names, self.by_class.tolist(), strict=True)
        return Examined(
            top1=measured.accuracy,
            top5=self.in_top5 / self.num_seen if self.num_classes >= FEWEST_CLASSES else None,
            cross_entropy=measured.cross_entropy,
            ece=self._ece(),
            agreement=self.num_agreed / self.num_taught if self.num_taught else None,
            teacher_kl=self.kl_sum / self.num_taught if self.num_taught else None,
            per_class=[ClassFigures(name, right / num if num else None, num) for name, (right, num) in counts],
            bins=self._bins(),
            confusions=self._confusions(),
        )
