"""Data classes of a run's report, and their computation from the results of its jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdpipe.pipeline.report.differences import NetworkDifference, Outcomes, between
from kdpipe.pipeline.report.verdict import Verdict
from kdpipe.stages.compress.artifacts.latency_record import Latencies
from kdpipe.stages.compress.targets import SCHEMES
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.intervals import Interval
from kdpipe.stages.evaluation.main_metric import ACCURACY, METRICS

QUANTIZED = tuple(kind for scheme in SCHEMES for kind in (f"{scheme}-unpruned", scheme))
PAIRS = tuple((kind, f"{kind}-alone") for kind in ("pruned", *QUANTIZED))
"""Kinds fine-tuned with the teacher's stores, each with its counterpart fine-tuned with hard labels alone."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Test accuracy of one class in percent, over the seeds; None without test samples."""

    name: str
    accuracy_mean: float | None
    accuracy_std: float | None
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class QualityMetrics:
    """A network's evaluation over its seeds, in percent (teacher_kl: in nats); None where it was not measured."""

    top5_mean: float | None = None
    top5_std: float | None = None
    agreement_mean: float | None = None
    agreement_std: float | None = None
    teacher_kl_mean: float | None = None
    teacher_kl_std: float | None = None
    ece_mean: float | None = None
    ece_std: float | None = None
    per_class: list[ClassRow] | None = None
    knn_mean: float | None = None
    linear_probe_mean: float | None = None


@dataclass(frozen=True)
class Row(QualityMetrics):
    """One network of a run, over its seeds; None where a value was not measured.

    Attributes:
        timed_as: Kind of the network whose file takes the same time.
        metric: What takes the place of accuracy in all figures, such as "agreement" where test images have no labels.
        accuracy_mean: Test accuracy in percent after the last epoch.
        interval: Its 95 % confidence interval in percent: the wider one of Wilson's over images (of mAP and R² the
            bootstrap's), and over several seeds Student's. None for one seed without the number of test images.
        best_accuracy_mean: The same after the best epoch, on the validation images if there are any.
        validation_mean: Accuracy on the validation images in percent, None without any.
        of_teacher: How many times smaller the ONNX file is than the teacher's, or than its weights in float32.
        of_student: The same against the distilled student's file.
        onnx_agreement: Lowest share over seeds, in percent, of test images with equal top-1 in ONNX and torch.
        latency_ms: By batch size, p50_ms and p95_ms of a batch.
    """

    name: str
    kind: str
    timed_as: str
    num_seeds: int
    accuracy_mean: float
    accuracy_std: float | None
    interval: Interval | None
    best_accuracy_mean: float
    num_parameters: int
    num_macs: int | None
    file_bytes: int | None
    of_teacher: float | None
    of_student: float | None
    onnx_agreement: float | None
    latency_ms: dict[str, dict[str, float]] | None
    files: list[str]
    validation_mean: float | None = None
    metric: str = ACCURACY.name

    @property
    def tested(self) -> str:
        """What the accuracy is, such as "test accuracy"."""
        return f"test {METRICS[self.metric].title}"


@dataclass(frozen=True)
class RecoveredAccuracy:
    """Percentage points that a compression lost against the student, without and with the teacher's stores.

    Attributes:
        points_lost_alone: Lost when fine-tuned with hard labels alone.
        points_lost: Lost when fine-tuned with the teacher's stores.
        share: Share of points_lost_alone that the stores recovered; None where hard labels did not clearly lose any.
    """

    name: str
    points_lost_alone: float
    points_lost: float
    share: float | None


@dataclass(frozen=True)
class Report:
    """Results of a run. missing: networks with unfinished jobs."""

    run: str
    recipe: str
    verdict: Verdict
    latency: Latencies | None
    rows: list[Row]
    differences: list[NetworkDifference]
    recovered: list[RecoveredAccuracy]
    pareto: str | None
    artifacts: list[str]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row(self, kind: str) -> Row | None:
        return next((row for row in self.rows if row.kind == kind), None)

    def difference(self, kind: str, against: str) -> NetworkDifference | None:
        return next((one for one in self.differences if (one.kind, one.against) == (kind, against)), None)


def recovered_accuracy(rows: Sequence[Row], outcomes: Outcomes) -> list[RecoveredAccuracy]:
    """Compare each compressed network with its hard-label baseline, where both have the same number of seeds."""
    by_kind = {row.kind: row for row in rows}
    student = by_kind.get("student")
    found: list[RecoveredAccuracy] = []
    for kind, baseline in PAIRS:
        row, alone = by_kind.get(kind), by_kind.get(baseline)
        if student is None or row is None or alone is None or row.num_seeds != alone.num_seeds:
            continue
        lost_alone = student.accuracy_mean - alone.accuracy_mean
        lost = student.accuracy_mean - row.accuracy_mean
        change = between(outcomes, baseline, "student")
        is_clear = change is not None and change.is_clear and lost_alone > 0
        share = 1 - lost / lost_alone if is_clear else None
        found.append(RecoveredAccuracy(row.name, lost_alone, lost, share))
    return found


def read_quality(results: Mapping[Path, Mapping[str, Any]]) -> QualityMetrics:
    """Summarize the evaluations in a network's results, given by job folder.

    Raises:
        RunError: If an evaluation is damaged.
    """
    found = {job: result["examined"] for job, result in results.items() if result.get("examined") is not None}
    if not found:
        return QualityMetrics()
    try:
        return replace(_summary(list(found.values())), **_of_embeddings(list(results.values())))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        folders = ", ".join(str(job) for job in found)
        raise RunError(
            f"the 'examined' entry of result.json in {folders} is damaged ({error!r}): delete the damaged folder and "
            "run the recipe again."
        ) from error


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean, None of no values, and the standard deviation, None of fewer than two."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def _summary(found: Sequence[Mapping[str, Any]]) -> QualityMetrics:
    metrics: dict[str, float | None] = {}
    for name, scale in (("top5", 100), ("agreement", 100), ("teacher_kl", 1), ("ece", 100)):
        values = [scale * seed[name] for seed in found if seed[name] is not None]
        metrics[f"{name}_mean"], metrics[f"{name}_std"] = mean_and_std(values)
    classes = zip(*(seed["per_class"] for seed in found), strict=True)
    return QualityMetrics(**metrics, per_class=[_class_row(over_seeds) for over_seeds in classes])


def _of_embeddings(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the accuracies of classifiers of a network's embeddings; None for networks without such results."""
    found: dict[str, float | None] = {}
    for name in ("knn", "linear_probe"):
        values = [100 * float(result[name]["accuracy"]) for result in results if name in result]
        found[f"{name}_mean"] = mean_and_std(values)[0]
    return found


def _class_row(over_seeds: Sequence[Mapping[str, Any]]) -> ClassRow:
    average, std = mean_and_std([100 * seed["accuracy"] for seed in over_seeds if seed["accuracy"] is not None])
    first = over_seeds[0]
    return ClassRow(
        name=str(first["name"]), accuracy_mean=average, accuracy_std=std, num_samples=int(first["num_samples"])
    )
