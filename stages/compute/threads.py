"""How many CPU threads a kind of work gets, beside other programs that may use the same cores.

Threads wait for each other at every operation. Where another program has taken a core, that costs far more than the
core's share, so work whose results do not depend on the number of threads is timed while it runs, and goes to one
thread or to all. Work whose last bits depend on it keeps its number.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import TypeVar

import torch

from kdpipe.stages.runtime.cpu import num_cores

T = TypeVar("T")

PROBE_SHARE = 0.03
"""The share of the time that may be lost by trying the number of threads that was slower before."""

NUM_TIMES = 3
"""Timings of a number of threads that count: the last ones. Their median ignores a single interruption."""

_limit: int | None = None
_is_chosen = True


def set_up_threads(count: int | None) -> None:
    """Use `count` CPU threads for each operation; None leaves the number to each job, up to the process's cores."""
    global _limit, _is_chosen  # like torch's number of threads, properties of the process
    _limit, _is_chosen = count or num_cores(), count is not None
    torch.set_num_threads(_limit)


def max_threads() -> int:
    """Return the largest number of threads of any operation."""
    return _limit or torch.get_num_threads()


def open_counts() -> list[int]:
    """Return the numbers of threads that a job may choose from, ascending; the only one if the user chose it."""
    most = max_threads()
    return [most] if _is_chosen else sorted({most, *(2**power for power in range(most.bit_length()))})


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads for each operation in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class AdaptiveThreads:
    """Runs work on one thread or on `max_threads()`, whichever is faster at present.

    Only for work whose results are the same with any number of threads. The other number is tried again as often as
    the time that this loses allows: all the time if both are alike, rarely if it is much slower.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times: dict[int, deque[float]] = {}  # seconds per item, by number of threads
        self._allowance = 0.0  # seconds that trying the slower number may lose

    def run(self, num_items: int, work: Callable[[], T]) -> T:
        """Return the result of `work`, which takes time in proportion to `num_items`."""
        most = max_threads()
        if most == 1:
            return work()
        best, count = self._choose((1, most), num_items)
        with threads(count):
            started = self._clock()
            result = work()
            seconds = self._clock() - started
        if count != best:
            self._allowance -= max(0.0, seconds - self._expected(best) * num_items)
        elif len(self._times) > 1:
            self._allowance += PROBE_SHARE * seconds
        self._times.setdefault(count, deque(maxlen=NUM_TIMES)).append(seconds / max(num_items, 1))
        return result

    def _choose(self, counts: tuple[int, int], num_items: int) -> tuple[int, int]:
        """Return the faster number of threads so far, and the one to use now."""
        for count in counts:
            if count not in self._times:
                return count, count
        best, other = sorted(counts, key=self._expected)
        loss = (self._expected(other) - self._expected(best)) * num_items
        return best, other if self._allowance >= loss else best

    def _expected(self, count: int) -> float:
        return median_low(self._times[count])
