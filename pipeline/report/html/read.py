"""Read a run for the HTML page: its report, and each job's result and metrics by epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.report.networks import NetworkEntry, network_entries
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report, Row
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.store.fs.safe_read import read_regular_file

MAX_METRICS_BYTES = 2**26
"""Read limit of a metrics.jsonl."""

MAIN_KINDS = ("teacher", "alone", "student")


@dataclass(frozen=True)
class Epoch:
    """A line of metrics.jsonl: number counted from 1, test accuracy in percent, weighted losses by name."""

    number: int
    accuracy: float
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Job:
    """One seed of a network. result: None until it is finished. num_damaged: unreadable lines of metrics."""

    folder: Path
    result: Mapping[str, Any] | None
    epochs: Sequence[Epoch]
    num_damaged: int

    @property
    def examined(self) -> Mapping[str, Any] | None:
        found = (self.result or {}).get("examined")
        return found if isinstance(found, Mapping) else None


@dataclass(frozen=True)
class Network:
    """A network over its seeds, finished or not."""

    name: str
    kind: str
    jobs: Sequence[Job]

    @property
    def color(self) -> str:
        return self.kind if self.kind in MAIN_KINDS else "compressed"

    @property
    def line(self) -> str:
        """Line style, so that color is not the only difference."""
        return {"teacher": "dotted", "alone": "dashed"}.get(self.kind, "solid")

    @property
    def done(self) -> list[Job]:
        return [job for job in self.jobs if job.result is not None]


@dataclass(frozen=True)
class PageRun:
    """A run as the page shows it. key: prefix of its anchors. Of `path` only the last name is shown."""

    path: Path
    key: str
    recipe: Mapping[str, Any]
    report: Report
    networks: Sequence[Network]

    @property
    def folder_name(self) -> str:
        return self.path.absolute().resolve().name or str(self.path)

    def network(self, kind: str) -> Network | None:
        return next((one for one in self.networks if one.kind == kind), None)

    def row(self, kind: str) -> Row | None:
        return next((one for one in self.report.rows if one.kind == kind), None)

    @property
    def main(self) -> list[Network]:
        """The teacher and the uncompressed students."""
        return [one for one in self.networks if one.kind in MAIN_KINDS]

    def without_path(self, sentence: object) -> str:
        """Return the sentence with the path of the run folder replaced by its name: pages are shared."""
        text = str(sentence)
        for place in sorted({str(self.path), str(self.path.absolute()), str(self.path.resolve())}, key=len)[::-1]:
            text = text.replace(place, self.folder_name) if place not in (".", "") else text
        return text


def read_run(path: Path, number: int) -> PageRun:
    """Read a run, without its stores and data. Raises RunError as `read_report` does."""
    report = read_report(path)
    recipe = read_json_file(path / "recipe.json") or {}
    networks = [_network(place) for place in network_entries(recipe, path)]
    return PageRun(path, f"run{number}-", recipe, report, networks)


def _network(place: NetworkEntry) -> Network:
    jobs = []
    for folder in place.jobs:
        job = JobDir(folder)
        lines = list(_epochs(job.metrics))
        epochs = sorted((one for one in lines if one is not None), key=lambda one: one.number)
        jobs.append(Job(folder, job.result(), epochs, len(lines) - len(epochs)))
    return Network(place.name, place.kind, jobs)


def _epochs(path: Path) -> Iterator[Epoch | None]:
    """Yield the lines of a metrics.jsonl; None for a damaged one."""
    try:
        raw = read_regular_file(path, MAX_METRICS_BYTES)
    except OSError:
        return
    text = raw[:MAX_METRICS_BYTES].decode(errors="replace")
    for line in text.splitlines():
        if line.strip():
            yield _epoch(line)


def _epoch(line: str) -> Epoch | None:
    try:
        record = json.loads(line)
        losses = {str(name): float(value) for name, value in record.get("losses", {}).items()}
        found = Epoch(int(record["epoch"]) + 1, 100 * float(record["accuracy"]), losses)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return found if found.number >= 1 and 0 <= found.accuracy <= 100 and math.isfinite(found.accuracy) else None
