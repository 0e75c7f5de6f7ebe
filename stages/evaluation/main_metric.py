"""The main metric of a network: accuracy, or what takes its place where the images have no classes.

Results, lines of metrics.jsonl and cards name it by `metric`, and have its value under that name; those without
`metric` have an accuracy. Whatever compares, ranks or prints networks reads it by these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.stages.data.tasks import CLASSIFICATION, EMBEDDING, MULTILABEL, REGRESSION, Task


@dataclass(frozen=True)
class MainMetric:
    """A metric of which 1 is the best, and more is better; it is shown in percent.

    Attributes:
        name: Its key in results.
        title: Its name in tables and sentences.
        least: The lowest value.
        is_share: Whether it is a share of the images, so that it varies over images as one of coins does.
    """

    name: str
    title: str
    least: float = 0.0
    is_share: bool = True

    def record(self, value: float) -> dict[str, Any]:
        """Return the keys of a result with this value."""
        return {**({} if self == ACCURACY else {"metric": self.name}), self.name: value}

    def checked(self, value: object) -> float:
        """Return a value of this metric from an untrusted record; raises ValueError if it is none."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.least <= value <= 1:
            raise ValueError(f"{self.name} = {str(value)[:40]} is not between {self.least:g} and 1")
        return float(value)


ACCURACY = MainMetric("accuracy", "accuracy")
AGREEMENT = MainMetric("agreement", "agreement with the teacher")

MAP = MainMetric("mAP", "mean average precision", is_share=False)
DECISIONS = MainMetric("decisions", "labels decided as the teacher does", is_share=False)
R2 = MainMetric("r2", "variance explained (R²)", least=-math.inf, is_share=False)
TEACHER_R2 = MainMetric("teacher_r2", "variance of the teacher's outputs explained (R²)", -math.inf, is_share=False)

MUTUAL_KNN = MainMetric("mutual_knn", "nearest neighbors shared with the teacher", is_share=False)

METRICS = {metric.name: metric for metric in (ACCURACY, AGREEMENT, MAP, DECISIONS, R2, TEACHER_R2, MUTUAL_KNN)}

_OF_TASK: dict[Task, tuple[MainMetric, MainMetric]] = {
    CLASSIFICATION: (ACCURACY, AGREEMENT),
    MULTILABEL: (MAP, DECISIONS),
    REGRESSION: (R2, TEACHER_R2),
    EMBEDDING: (MUTUAL_KNN, MUTUAL_KNN),
}


def metric_for(task: Task, *, has_labels: bool) -> MainMetric:
    """Return what networks are judged by on images with labels, or without a single one."""
    return _OF_TASK[task][0 if has_labels else 1]


def metric_of(record: Mapping[str, Any]) -> MainMetric:
    """Return the main metric of a result, an epoch's line, or a row of a table; raises ValueError if unknown."""
    name = record.get("metric", ACCURACY.name)
    if not isinstance(name, str) or name not in METRICS:
        raise ValueError(f"metric = {str(name)[:40]!r} is none of {', '.join(METRICS)}")
    return METRICS[name]


def main_value(record: Mapping[str, Any]) -> float:
    """Return the value of a record's main metric, 1 at most.

    Raises:
        ValueError: It is missing or out of bounds.
    """
    metric = metric_of(record)
    return metric.checked(record.get(metric.name))


def deciding(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a job's results that choices look at: of the validation images, else of the test images."""
    return result.get("validation") or result


def best_value(result: Mapping[str, Any]) -> float:
    """Return the main metric after the best epoch, on the images that choices look at."""
    metric = metric_of(deciding(result))
    return metric.checked(result.get(f"best_{metric.name}"))


def main_percent(record: Mapping[str, Any]) -> float:
    """Return a record's main metric in percent."""
    return 100 * main_value(record)
