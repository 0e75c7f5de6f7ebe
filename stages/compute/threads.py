"""How many CPU threads a kind of work gets, beside other programs that may use the same cores.

Threads wait for each other at every operation. Where another program has taken a core, that costs far more than the
core's share, so work whose results do not depend on the number of threads is timed while it runs, and goes to one
thread or to all. Work whose last bits depend on it keeps its number.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from statistics import median_low
from typing import Any, TypeVar

import psutil
import torch

from kdpipe.stages.compute.trial import choose, time_in_turn
from kdpipe.stages.runtime.cpu import affinity_cores, num_cores, omp_num_threads

T = TypeVar("T")

PROBE_SHARE = 0.01
"""The share of the time that may be lost by trying the number of threads that was slower before."""

PERIOD_S = 0.01
"""A number of threads is used and timed for this long at least."""

NUM_TIMES = 5
"""Periods of a number of threads that count: the last ones. Their median ignores two interruptions."""

MIN_THREAD_GAIN = 1.5
"""More threads must be this many times as fast as fewer where a job keeps their number: they lose more when another
program starts."""

MIN_ADAPTIVE_GAIN = 1.1
"""More threads must be this many times as fast as one where their number can change at any batch."""

_limit: ContextVar[int | None] = ContextVar("limit", default=None)
"""The largest number of threads that jobs may choose; None where the user chose the number, which is then torch's."""


def set_up_threads(count: int | None) -> None:
    """Use `count` CPU threads for each operation; None is one, and jobs choose more, up to the process's cores."""
    _limit.set(None if count else num_cores())
    torch.set_num_threads(count or 1)


@contextmanager
def threads_of_call() -> Iterator[None]:
    """Set up the threads for a call of the Python API and restore torch's number; a number that was set is used."""
    limit, before = _limit.get(), torch.get_num_threads()
    cores = affinity_cores()
    by_torch = {cores, min(cores, psutil.cpu_count(logical=False) or cores)}  # with MKL it takes the physical cores
    is_default = omp_num_threads(os.environ) is None and before in by_torch
    set_up_threads(None if is_default else before)
    try:
        yield
    finally:
        _limit.set(limit)
        torch.set_num_threads(before)


def max_threads() -> int:
    """Return the largest number of threads of any operation."""
    return _limit.get() or torch.get_num_threads()


def open_counts() -> list[int]:
    """Return the numbers of threads that a job may choose from, ascending; the only one if the user chose it."""
    most = max_threads()
    return [most] if _limit.get() is None else sorted({1, max(1, most // 2), most})


def fastest_count(counts: Sequence[int], run: Callable[[], object], *, may_drop: bool = True) -> int:
    """Return the smallest of the numbers of threads, ascending, that no larger one clearly beats at `run`.

    Where processes wait for each other in `run`, all must run it equally often: without `may_drop`.
    """
    if len(counts) == 1:
        return counts[0]
    runs = {count: partial(_on_threads, count, run) for count in counts}
    return choose(time_in_turn(runs, torch.device("cpu"), may_drop=may_drop), min_gain=MIN_THREAD_GAIN)


def _on_threads(count: int, run: Callable[[], T]) -> T:
    with threads(count):
        return run()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads for each operation in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def restored_threads() -> Iterator[None]:
    """Restore the number of threads of each operation after the block, which may change it."""
    with threads(torch.get_num_threads()):
        yield


class AdaptiveThreads:
    """Runs work on one thread or on `max_threads()`, whichever is faster at present.

    Only for work whose results are the same with any number of threads. A number is used for PERIOD_S at least, so that
    choosing costs nothing beside small batches. The other number is tried again as often as the time that this loses
    allows: all the time if both are alike, rarely if it is much slower.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times: dict[int, deque[float]] = {}  # seconds per item in periods, by number of threads
        self._allowance = 0.0  # seconds that trying the slower number may lose
        self._best = self._in_use = 0  # the faster number before this period, and the one in use
        self._seconds, self._num_items = math.inf, 0  # of this period

    def run(self, num_items: int, work: Callable[[], T]) -> T:
        """Return the result of `work`, which takes time in proportion to `num_items`."""
        most = max_threads()
        if most == 1:
            return work()
        if self._seconds >= PERIOD_S or self._in_use > most:
            self._start_period(most)
        with threads(self._in_use):
            started = self._clock()
            result = work()
            self._seconds += self._clock() - started
        self._num_items += num_items
        return result

    def _start_period(self, most: int) -> None:
        if self._num_items:
            self._record_period()
        self._best, self._in_use = self._choose((1, most))
        self._seconds, self._num_items = 0.0, 0

    def _record_period(self) -> None:
        if self._in_use != self._best:
            self._allowance -= max(0.0, self._seconds - self._expected(self._best) * self._num_items)
        elif len(self._times) > 1:
            self._allowance += PROBE_SHARE * self._seconds
        self._times.setdefault(self._in_use, deque(maxlen=NUM_TIMES)).append(self._seconds / self._num_items)

    def _choose(self, counts: tuple[int, int]) -> tuple[int, int]:
        """Return the faster number of threads so far, and the one to use now."""
        for count in counts:
            if count not in self._times:
                return count, count
        best = choose({count: self._expected(count) for count in counts}, min_gain=MIN_ADAPTIVE_GAIN)
        (other,) = set(counts) - {best}
        loss = (self._expected(other) / self._expected(best) - 1) * max(PERIOD_S, self._seconds)
        return best, other if self._allowance >= loss else best

    def _expected(self, count: int) -> float:
        return median_low(self._times[count])


class CheckedThreads(AdaptiveThreads):
    """Runs a network on the faster number of threads where its outputs do not depend on it.

    The first batch of each kind is computed on one thread and on all: if a single bit differs, all batches of this
    kind are computed on `count` threads.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._may_adapt: dict[Hashable, bool] = {}

    def run_checked(
        self, kind: tuple[Any, ...], work: Callable[[], T], tensors: Callable[[T], Iterable[torch.Tensor]]
    ) -> T:
        """Return the result of `work` on a batch of this kind; `tensors` are those of a result.

        `kind` is the batch's shape, and what else decides the result.
        """
        most = max_threads()
        if most == 1:
            return work()
        if kind not in self._may_adapt:
            result, *others = (_on_threads(count, work) for count in dict.fromkeys((self._count, 1, most)))
            expected = list(tensors(result))
            self._may_adapt[kind] = all(map(torch.equal, expected * len(others), chain(*map(tensors, others))))
            return result
        return self.run(kind[0], work) if self._may_adapt[kind] else _on_threads(self._count, work)
