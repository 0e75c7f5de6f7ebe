"""Read a run for the HTML page: its report, and each job's result and metrics by epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdpipe.pipeline.report.networks import NetworkEntry, Style, cohort_entries, network_entries, style_of
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report, Row
from kdpipe.stages.data.splits import VALIDATION
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.main_metric import ACCURACY, main_percent, metric_of
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.store.fs.checksums import require_intact
from kdpipe.store.fs.safe_read import read_regular_file

MAX_METRICS_BYTES = 2**26
"""Read limit of a metrics.jsonl."""

MAIN_KINDS = ("teacher", "alone", "student")


@dataclass(frozen=True)
class Epoch:
    """A line of metrics.jsonl: number counted from 1, main metric in percent, weighted losses by name.

    measured: What the accuracy is, and on which split.
    """

    number: int
    accuracy: float
    losses: Mapping[str, float]
    measured: str = "test accuracy"


@dataclass(frozen=True)
class Job:
    """One seed of a network. result: None until it is finished."""

    folder: Path
    result: Mapping[str, Any] | None

    @cached_property
    def epochs(self) -> list[Epoch]:
        """The lines of metrics.jsonl; an absent one is empty. Raises RunError if it is damaged."""
        path = JobDir(self.folder).metrics
        require_intact(path)
        try:
            lines = read_regular_file(path, MAX_METRICS_BYTES).decode().splitlines()
            return [_epoch(json.loads(line)) for line in lines if line.strip()]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise RunError(f"{path} is damaged ({error}): delete its folder, and run the recipe again.") from error

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
    def style(self) -> Style:
        return style_of(self.kind)

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
    cohort: Sequence[Network] = ()

    @property
    def folder_name(self) -> str:
        return self.path.absolute().resolve().name or str(self.path)

    def network(self, kind: str) -> Network | None:
        return next((network for network in self.networks if network.kind == kind), None)

    def row(self, kind: str) -> Row | None:
        return self.report.row(kind)

    @property
    def is_labeled(self) -> bool:
        """Whether networks are judged by labels, not by their agreement with the teacher."""
        return all(row.metric == ACCURACY.name for row in self.report.rows)

    @property
    def main(self) -> list[Network]:
        """The teacher and the uncompressed students."""
        return [network for network in self.networks if network.kind in MAIN_KINDS]

    def without_path(self, sentence: object) -> str:
        """Return the sentence with the path of the run folder replaced by its name: pages are shared."""
        text = str(sentence)
        for path in sorted({str(self.path), str(self.path.absolute()), str(self.path.resolve())}, key=len)[::-1]:
            text = text.replace(path, self.folder_name) if path not in (".", "") else text
        return text


def read_run(path: Path, number: int) -> PageRun:
    """Read a run, without its stores and data. Raises RunError as `read_report` does."""
    report = read_report(path)
    recipe = read_json_file(path / "recipe.json") or {}
    networks = [_network(entry) for entry in network_entries(recipe, path)]
    cohort = [_network(entry) for entry in cohort_entries(recipe, path)]
    return PageRun(path, f"run{number}-", recipe, report, networks, cohort)


def recommended(run: PageRun) -> tuple[str, Path] | None:
    """Return the kind of the network that the first seed's card recommends, and the folder of its artifacts."""
    for folder in map(Path, run.report.artifacts):
        ranking = (read_json_file(folder / "card.json") or {}).get("ranking")
        if ranking is None:
            continue
        if not isinstance(ranking, list) or not ranking or not isinstance(ranking[0], str):
            raise RunError(f"{folder / 'card.json'} is damaged: run `kdpipe compress` again.")
        return ranking[0], folder / ranking[0]
    return None


def _network(entry: NetworkEntry) -> Network:
    return Network(entry.name, entry.kind, [Job(folder, JobDir(folder).result()) for folder in entry.jobs])


def _epoch(record: dict[str, Any]) -> Epoch:
    number, accuracy = int(record["epoch"]) + 1, main_percent(record)
    if number < 1:
        raise ValueError(f"there is no epoch {number}")
    losses = {str(name): float(value) for name, value in record.get("losses", {}).items()}
    split = VALIDATION if record.get("split") == VALIDATION else "test"
    return Epoch(number, accuracy, losses, f"{split} {metric_of(record).title}")
