"""One run folder in `kdpipe status`: what its lock, its events and its finished jobs say."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.report.networks import Place, places_of
from pipeline.status.events import Standing, read_lines, standing
from pipeline.status.files import Budget, Measure, lock_holder, number, read_object, share, text
from pipeline.terminal.exit_codes import DONE, DONE_IN_PART, INTERRUPTED, STOPPED_EARLY

LOCK = ".kdpipe.lock"
RECIPE = "recipe.json"
MOST_SEEDS = 1000
SILENT_S = 600.0
"""A job on another machine, whose lock may not be seen here, is taken for dead after so long a silence."""

WORDS = {DONE: "done", DONE_IN_PART: "done in part", STOPPED_EARLY: "stopped early", INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class RunStatus:
    """A run folder. state: running, killed, done, done in part, stopped early, interrupted, failed (exit N), idle, or
    damaged. step of total units of `job`; eta_s: seconds left from now; last_sign: seconds since 1970;
    accuracies: means over seeds, in percent, by the network's name.
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
    last_sign: float
    disk_bytes: int
    num_networks_done: int
    num_networks: int
    accuracies: dict[str, float]


def is_run(folder: Path, names: set[str]) -> bool:
    """Whether a folder in which these files are is a run's."""
    if RECIPE not in names:
        return False
    if names & {LOCK, "events.jsonl", "run.json"}:
        return True
    recipe = read_object(folder / RECIPE) or {}
    return {"name", "student", "data"} <= set(recipe)


def run_status(folder: Path, held: Measure, budget: Budget) -> RunStatus:
    """What is to be known of the run in `folder`, whose files have been measured."""
    now = time.time()
    stands = standing(read_lines(folder))
    read = read_object(folder / RECIPE)
    recipe = read or {}
    places = _places(recipe, folder)
    num_done = sum((job / "result.json").exists() for place in places for job in place.jobs)
    num_networks = sum(len(place.jobs) for place in places)
    state, who = _state(folder, stands, now)
    if state == "idle" and num_done == num_networks > 0:
        state = "done"
    return RunStatus(
        path=str(folder),
        name=text(recipe.get("name")),
        state="damaged" if read is None else state,
        who=who,
        **_standing_of(stands, state, now),
        last_sign=min(now, max(held.newest, stands.heard_at if stands else 0.0)),
        disk_bytes=held.num_bytes,
        num_networks_done=num_done,
        num_networks=num_networks,
        accuracies=dict(_accuracies(places, recipe, folder, budget)),
    )


def _standing_of(stands: Standing | None, state: str, now: float) -> dict[str, Any]:
    """Where it stands in its last job; rate and time left only while it runs."""
    at = stands.at if stands else None
    rate = stands.rate_per_s if stands and state == "running" else None
    left = (at.total - at.step) / rate - (now - at.at) if at and rate and at.step < at.total else None
    return {
        "command": stands.command if stands else "",
        "stage": at.stage if at else "",
        "job": at.job if at else "",
        "step": at.step if at else None,
        "total": at.total if at else None,
        "unit": at.unit if at else "",
        "rate_per_s": rate,
        "eta_s": None if left is None else max(0.0, left),
    }


def _state(folder: Path, stands: Standing | None, now: float) -> tuple[str, str]:
    """The state of a run, and which process is at it."""
    # Only where the events leave it open whether a job runs is its lock tried: a look should disturb nobody.
    holder = lock_holder(folder / LOCK, ask=stands is None or not stands.has_ended)
    if holder is not None:
        job = f" (job {text(holder.job_id)})" if holder.job_id else ""
        return "running", f"pid {holder.pid} on {text(holder.host)}{job}" if holder.pid else "another job"
    if stands is None:
        return "idle", ""
    if stands.has_ended:
        return WORDS.get(stands.exit_code or DONE, f"failed (exit {stands.exit_code})"), ""
    elsewhere = stands.host != socket.gethostname()
    if elsewhere and now - stands.heard_at < SILENT_S:
        return "running", f"pid {stands.pid} on {stands.host}, by its last sign of life"
    return "killed", f"was pid {stands.pid} on {stands.host}"


def _places(recipe: Mapping[str, Any], folder: Path) -> list[Place]:
    """The networks that a recipe makes; none of a recipe that is none, or whose names would lead elsewhere."""
    try:
        seeds, kind = recipe["student"]["seeds"], _scheme(recipe)
        sound = kind.isalnum() and len(seeds) <= MOST_SEEDS and None not in [number(seed) for seed in seeds]
        return places_of(recipe, folder) if sound else []
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _accuracies(
    places: list[Place], recipe: Mapping[str, Any], folder: Path, budget: Budget
) -> Iterator[tuple[str, float]]:
    """Mean test accuracy, in percent, of the networks that a line has room for; of ways that are compared, the best."""
    kinds = {place.kind: place for place in places}
    last = next((kinds[kind] for kind in (_scheme(recipe), "pruned") if kind in kinds), None)
    for place in [kinds.get("alone"), kinds.get("student"), last]:
        found = [] if place is None else [_accuracy(job) for job in place.jobs]
        known = [100 * one for one in found if one is not None]
        if place and known:
            yield place.name.removeprefix("student "), mean(known)
    ways = {
        text(way.name): [one for job in budget.entries(way.path, MOST_SEEDS) if (one := _accuracy(Path(job.path)))]
        for way in budget.entries(folder / "compare", MOST_SEEDS)
    }
    means = {way: 100 * mean(found) for way, found in ways.items() if found}
    if means:
        best = max(means, key=means.__getitem__)
        yield f"best of {len(means)} ways: {best}", means[best]


def _scheme(recipe: Mapping[str, Any]) -> str:
    """What quantized networks are called: int8, int4."""
    compress = recipe.get("compress")
    quantize = compress.get("quantize") if isinstance(compress, dict) else None
    return str(quantize.get("scheme", "int8")) if isinstance(quantize, dict) else "int8"


def _accuracy(job: Path) -> float | None:
    return share((read_object(job / "result.json") or {}).get("accuracy"))
