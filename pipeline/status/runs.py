"""Determine the status of a run folder from its lock, the end of its event log, and its finished jobs."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from kdpipe.pipeline.report.networks import MADE_IN_PYTHON, NetworkEntry, network_entries
from kdpipe.pipeline.session.event_log import EVENTS
from kdpipe.pipeline.status.files import Budget, Measure, number, read_tail, text
from kdpipe.pipeline.status.search import SEARCH, best_of_search, trials_of_search
from kdpipe.pipeline.terminal.exit_codes import DONE, DONE_IN_PART, INTERRUPTED, STOPPED_EARLY
from kdpipe.stages.compress.targets import SCHEMES
from kdpipe.stages.evaluation.main_metric import ACCURACY, main_percent, metric_of
from kdpipe.store.fs.checksums import read_intact_json
from kdpipe.store.fs.lock import lock_holder

LOCK = ".kdpipe.lock"
RECIPE = "recipe.json"
MAX_SEEDS = 1000
SILENT_S = 600.0
"""A job on another machine, whose lock may be invisible here, counts as dead after this long without events."""

TAIL_BYTES = 64 * 1024
RATE_WINDOW_S = 600.0

STATES = {DONE: "done", DONE_IN_PART: "done in part", STOPPED_EARLY: "stopped early", INTERRUPTED: "interrupted"}


VARIANTS = {"compare": "variants", "sweep": "settings"}
"""Commands that train several variants of the student, and what these are called."""

COHORT = "cohort"
"""The command whose networks are in the folder of the students, as in COHORT_JOB."""

COHORT_JOB = re.compile(r"cohort-(?:\d+|(ensemble))-seed\d+")

COMPUTED = ("step", "unit", "turn")
"""Units of the progress of work, unlike those of checks."""


@dataclass(frozen=True)
class LoggedEvent:
    """One checked line of an untrusted events.jsonl. `time` is in seconds since 1970."""

    time: float
    kind: str
    command: str
    host: str
    pid: int
    exit_code: int | None
    stage: str
    job: str
    step: int
    total: int
    unit: str


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run's last process: its last event, its last progress event, and the rate in units a second."""

    last: LoggedEvent
    current: LoggedEvent | None
    rate_per_s: float | None

    @property
    def has_ended(self) -> bool:
        return self.last.kind == "end"


@dataclass(frozen=True)
class RunStatus:
    """Status of a run folder.

    Attributes:
        state: running, killed, done, done in part, stopped early, interrupted, failed (exit N), idle, or damaged.
        command: The command of its last process, or python for a folder of the Python API.
        who: The process that runs it, or ran it when it was killed.
        step: Finished units of `job`, of `total`.
        eta_s: Seconds left.
        last_active: Time of the last activity, in seconds since 1970.
        accuracies: Test accuracy in percent, mean over seeds, by the network's name.
        trials: Numbers of the trials of a search by their state, of all under "planned", and of the best one under
            "best"; empty without a search.
    """

    path: str
    name: str
    state: str
    who: str
    command: str
    stage: str
    job: str
    step: int | None
    total: int | None
    unit: str
    rate_per_s: float | None
    eta_s: float | None
    last_active: float
    disk_bytes: int
    num_networks_done: int
    num_networks: int
    accuracies: dict[str, float]
    trials: dict[str, int] = field(default_factory=dict)


def is_run(folder: Path, names: set[str]) -> bool:
    """Return whether a folder that contains `names` is a run folder."""
    if RECIPE not in names:
        return False
    if names & {LOCK, "events.jsonl", "run.json"}:
        return True
    recipe = read_intact_json(folder / RECIPE) or {}
    return {"name", "student", "data"} <= set(recipe)


def run_status(folder: Path, size: Measure, budget: Budget) -> RunStatus:
    """Return the status of the run in `folder`, whose files were measured as `size`."""
    now = time.time()
    progress = read_progress(folder)
    current = progress.current if progress else None
    stored = read_intact_json(folder / RECIPE)
    networks = _networks(stored or {}, folder)
    in_python, command = (folder / MADE_IN_PYTHON).exists(), progress.last.command if progress else ""
    only_begun = in_python or command in (*VARIANTS, COHORT, SEARCH)  # which do not make all networks of the recipe
    jobs = [job for network in networks for job in network.jobs if not only_begun or job.exists()]
    if command in VARIANTS:
        jobs += [job for _, own in _variants(folder / command, budget) for job in own]
    jobs += [job for own in _cohort(folder, budget).values() for job in own] if command == COHORT else []
    if command == SEARCH:
        jobs += [job for _, own in _variants(folder / SEARCH / "final", budget) for job in own]
    num_done, num_networks = sum((job / "result.json").exists() for job in jobs), len(jobs)
    state, who = _state(folder, progress, now)
    if state == "idle" and num_done == num_networks > 0:
        state = "done"
    rate = progress.rate_per_s if progress and state == "running" else None
    left_s = None
    if current and rate and current.step < current.total:
        left_s = max(0.0, (current.total - current.step) / rate - (now - current.time))
    return RunStatus(
        path=str(folder),
        name=text((stored or {}).get("name")),
        state="damaged" if stored is None else state,
        who=who,
        command=command or ("python" if in_python else ""),
        stage=current.stage if current else "",
        job=current.job if current else "",
        step=current.step if current else None,
        total=current.total if current else None,
        unit=current.unit if current else "",
        rate_per_s=rate,
        eta_s=left_s,
        last_active=min(now, max(size.newest, progress.last.time if progress else 0.0)),
        disk_bytes=size.num_bytes,
        num_networks_done=num_done,
        num_networks=num_networks,
        accuracies=dict(_accuracies(networks, folder, budget)),
        trials=trials_of_search(folder),
    )


def _state(folder: Path, progress: RunProgress | None, now: float) -> tuple[str, str]:
    """Return the state of a run, and its process."""
    if holder := lock_holder(folder / LOCK):
        job = f" (job {text(holder.job_id)})" if holder.job_id else ""
        return "running", f"pid {holder.pid} on {text(holder.host)}{job}" if holder.pid else "another job"
    if progress is None:
        return "idle", ""
    last = progress.last
    if progress.has_ended:
        return STATES.get(last.exit_code or DONE, f"failed (exit {last.exit_code})"), ""
    if last.host != socket.gethostname() and now - last.time < SILENT_S:
        return "running", f"pid {last.pid} on {last.host}, by its last event"
    return "killed", f"was pid {last.pid} on {last.host}"


def _networks(recipe: Mapping[str, Any], folder: Path) -> list[NetworkEntry]:
    """Return the networks that a recipe makes; none if it is invalid."""
    try:
        return network_entries(recipe, folder) if len(recipe["student"]["seeds"]) <= MAX_SEEDS else []
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _accuracies(networks: list[NetworkEntry], folder: Path, budget: Budget) -> Iterator[tuple[str, float]]:
    """Yield the mean test accuracy in percent of the main networks, of a cohort, and of the best variants."""
    by_kind = {network.kind: network for network in networks}
    smallest = next((by_kind[kind] for kind in (*SCHEMES, "pruned") if kind in by_kind), None)
    for network in (by_kind.get("alone"), by_kind.get("student"), smallest):
        if network and (known := _known(network.jobs)):
            yield network.name.removeprefix("student ") + known.what, mean(known.percents)
    for name, jobs in _cohort(folder, budget).items():
        if known := _known(jobs):
            yield name + known.what, mean(known.percents)
    for command, what in VARIANTS.items():
        yield from _best_of(folder / command, what, budget)
    if (accuracy := best_of_search(folder)) is not None:
        yield "search's best", accuracy


def _best_of(folder: Path, what: str, budget: Budget) -> Iterator[tuple[str, float]]:
    """Yield the mean test accuracy of the best variant in a folder: on the validation images, if all have these."""
    means: dict[str, float] = {}
    deciding: dict[str, float] = {}
    for variant, jobs in _variants(folder, budget):
        if not variant.startswith("alone,") and (known := _known(jobs)):
            name = text(variant) + known.what
            means[name], validated = mean(known.percents), _known(jobs, "validation")
            deciding |= {name: mean(validated.percents)} if validated else {}
    if means:
        best = max(means, key=(deciding if len(deciding) == len(means) else means).__getitem__)
        yield f"best of {len(means)} {what}: {best}", means[best]


def _cohort(folder: Path, budget: Budget) -> dict[str, list[Path]]:
    """Return the folders of a cohort's jobs: those of its members, and of the ensembles."""
    found: dict[str, list[Path]] = {}
    for entry in budget.entries(folder / "students", MAX_SEEDS):
        if match := COHORT_JOB.fullmatch(entry.name):
            found.setdefault("cohort ensemble" if match[1] else "cohort members", []).append(Path(entry.path))
    return found


def _variants(folder: Path, budget: Budget) -> Iterator[tuple[str, list[Path]]]:
    """Yield the variants in a folder with the folders of their jobs."""
    for variant in budget.entries(folder, MAX_SEEDS):
        jobs = [Path(job.path) for job in budget.entries(variant.path, MAX_SEEDS)]
        if jobs:
            yield variant.name, [job for job in jobs if job.name.startswith("seed")]


@dataclass(frozen=True)
class _Known:
    """Main metrics in percent; what they are, such as " (agreement)", if no accuracies."""

    percents: list[float]
    what: str


def _known(jobs: Iterable[Path], part: str = "test") -> _Known | None:
    """Return the main metrics of finished jobs on the test or validation images; results are untrusted."""
    results = [read_intact_json(job / "result.json") or {} for job in jobs]
    percents, what = [], ""
    for one in results if part == "test" else [result.get(part) for result in results]:
        with suppress(ValueError):
            if isinstance(one, dict):
                percents.append(main_percent(one))
                what = "" if metric_of(one) == ACCURACY else f" ({metric_of(one).name})"
    return _Known(percents, what) if percents else None


def read_progress(run: Path) -> RunProgress | None:
    """Return the progress of the process that wrote the last event in a run folder; None without events.

    A process that was refused, and computed nothing, does not count if another one was there before.
    """
    events = [event for raw in read_tail(run / EVENTS, TAIL_BYTES) if (event := _parse(raw))]
    if not events:
        return None
    sessions: dict[tuple[str, int, int], list[LoggedEvent]] = {}  # the last of them wrote the last event
    num_begun: Counter[tuple[str, int]] = Counter()
    for event in events:
        process = event.host, event.pid
        num_begun[process] += event.kind == "begin"
        key = *process, num_begun[process]
        sessions[key] = [*sessions.pop(key, []), event]
    latest = list(sessions.values())
    own = next((own for own in reversed(latest) if not _is_refused(own)), latest[-1])
    last, own = own[-1], [event for event in own if event.kind == "progress" and event.total > 0]
    current = own[-1] if own else None
    job = [event for event in own if current and (event.stage, event.job) == (current.stage, current.job)]
    return RunProgress(last, current, _rate(job))


def _is_refused(events: Sequence[LoggedEvent]) -> bool:
    """Return whether the events of a process end with an error, and with nothing computed."""
    has_failed = events[-1].kind == "end" and (events[-1].exit_code or DONE) not in STATES
    return has_failed and not any(event.unit in COMPUTED and event.step < event.total for event in events)


def _parse(raw: bytes) -> LoggedEvent | None:
    """Return the event of a line; None if it is incomplete or invalid."""
    try:
        record = json.loads(raw)
        seconds = datetime.fromisoformat(record["time"]).timestamp()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
        return None
    texts: dict[str, Any] = {
        name: text(record.get(name)) for name in ("kind", "command", "host", "stage", "job", "unit")
    }
    counts: dict[str, Any] = {name: number(record.get(name)) or 0 for name in ("pid", "step", "total")}
    code = record.get("exit_code")
    return LoggedEvent(
        time=seconds, exit_code=code if type(code) is int and abs(code) < 1000 else None, **texts, **counts
    )


def _rate(events: Sequence[LoggedEvent]) -> float | None:
    """Return the rate of the last ten minutes."""
    recent = [event for event in events if events[-1].time - event.time <= RATE_WINDOW_S]
    steps = recent[-1].step - recent[0].step if recent else 0
    elapsed_s = recent[-1].time - recent[0].time if recent else 0.0
    return steps / elapsed_s if steps > 0 and elapsed_s > 0 else None
