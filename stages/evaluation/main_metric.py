"""The main metric of a network: accuracy, or what takes its place where the images have no labels.

Results, lines of metrics.jsonl and cards name it by `metric`, and have its value under that name; those without
`metric` have an accuracy. Whatever compares, ranks or prints networks reads it by these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MainMetric:
    """A metric of which 1 is the best, and more is better; it is shown in percent.

    Attributes:
        name: Its key in results.
        title: Its name in tables and sentences.
        least: The lowest value.
    """

    name: str
    title: str
    least: float = 0.0

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

METRICS = {metric.name: metric for metric in (ACCURACY, AGREEMENT)}


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
