"""Trials: time several ways to compute the same, in turn, and choose one that is clearly faster.

A choice decides last bits, so it must not depend on a machine's load of the moment: small jobs have no trial, a
candidate must be faster by `MIN_GAIN`, and what was chosen is recorded with the store or the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median_low
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


def time_in_turn(
    runs: Mapping[K, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 4,
    clock: Clock | None = None,
    may_drop: bool = True,
) -> dict[K, float]:
    """Return the median seconds of each of `runs`, called in turn, so that the load of the moment slows all alike.

    The first round warms up: of an even number of rounds the lower median counts. If it `may_drop`, a run that takes
    more than twice as long as another in two rounds is not called again.
    """
    clock = clock or time.perf_counter
    times: dict[K, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            if number < 2 or not may_drop or min(times[name]) <= 2 * min(map(min, times.values())):
                times[name].append(_seconds(run, device, clock))
    return {name: median_low(found) for name, found in times.items()}


def time_on_one_thread(
    runs: Mapping[K, Callable[[], object]], device: torch.device, *, may_drop: bool = True
) -> dict[K, float]:
    """Return the median seconds of each of `runs` on one CPU thread: its own time, without that of other programs."""
    if device.type != "cpu":
        return time_in_turn(runs, device, may_drop=may_drop)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return time_in_turn(runs, device, clock=time.thread_time, may_drop=may_drop)
    finally:
        torch.set_num_threads(before)


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
