"""Trials: time several ways to compute the same, in turn, and choose one that is clearly faster.

A choice decides last bits, so it must not depend on a machine's load of the moment: small jobs have no trial, a
candidate must be faster by `MIN_GAIN`, and what was chosen is recorded with the store or the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

K = TypeVar("K")

Clock = Callable[[], float]

MIN_GAIN = 1.25
"""A candidate replaces one that stands before it only if it is this many times as fast."""

WORTH_A_TRIAL = {"cpu": 2e13, "cuda": 2e15}
"""Multiply-accumulates of a job's forward passes from which a trial pays: minutes on one CPU core, seconds on a GPU."""


def is_worth_a_trial(num_macs: float, device: torch.device) -> bool:
    """Return whether a job of that many multiply-accumulates, over all images and passes, has a trial."""
    return num_macs >= WORTH_A_TRIAL.get(device.type, float("inf"))


def one_thread_clock(device: torch.device) -> Clock:
    """Return the clock for runs that keep the number of threads: on one CPU thread its own time, without its waits."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_in_turn(
    runs: Mapping[K, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 3,
    clock: Clock = time.perf_counter,
) -> dict[K, float]:
    """Return the median seconds of each of `runs`, called in turn after one call that is not counted."""
    for run in runs.values():
        _seconds(run, device, clock)
    times: dict[K, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, device, clock))
    return {name: median(found) for name, found in times.items()}


def choose(seconds: Mapping[K, float], *, min_gain: float = MIN_GAIN) -> K:
    """Return the first of the candidates, in order of preference, that no later one beats by `min_gain`."""
    names = list(seconds)
    chosen = names[0]
    for name in names[1:]:
        if seconds[name] * min_gain <= seconds[chosen]:
            chosen = name
    return chosen


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    _wait(device)
    started = clock()
    run()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
