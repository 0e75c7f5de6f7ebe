"""Read the evaluation metrics of a network's jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdpipe.pipeline.report.rows import ClassRow, QualityMetrics
from kdpipe.stages.errors import RunError


def read_quality(results: Mapping[Path, Mapping[str, Any]]) -> QualityMetrics:
    """Summarize the evaluations in a network's results, given by job folder.

    Raises:
        RunError: If an evaluation is damaged.
    """
    found = {job: result["examined"] for job, result in results.items() if result.get("examined") is not None}
    if not found:
        return QualityMetrics()
    try:
        return _summary(list(found.values()))
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
        values = [scale * one[name] for one in found if one[name] is not None]
        metrics[f"{name}_mean"], metrics[f"{name}_std"] = mean_and_std(values)
    classes = zip(*(one["per_class"] for one in found), strict=True)
    return QualityMetrics(**metrics, per_class=[_class_row(over_seeds) for over_seeds in classes])


def _class_row(over_seeds: Sequence[Mapping[str, Any]]) -> ClassRow:
    average, std = mean_and_std([100 * one["accuracy"] for one in over_seeds if one["accuracy"] is not None])
    first = over_seeds[0]
    return ClassRow(
        name=str(first["name"]), accuracy_mean=average, accuracy_std=std, num_samples=int(first["num_samples"])
    )
