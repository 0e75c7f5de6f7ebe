"""Stepping back behind others on the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

THREADS = Path("/proc/self/task")


def step_back(nice: int) -> None:
    """Give every thread of this process at least the nice value `nice`, 0 (not at all) to 19. Never fails.

    A thread that has a higher one keeps it. Threads and processes that are started later inherit it; there is no way
    back without privileges. On an idle machine nothing is slower for it, so latencies that are measured there are what
    they were; on a busy one they suffer more. Where the kernel groups processes by session (autogroup), the value
    only counts against those of the same session, and across control groups only their weights do.
    """
    if nice <= 0:
        return
    for thread in _threads():
        with suppress(OSError):  # it has ended meanwhile
            if os.getpriority(os.PRIO_PROCESS, thread) < nice:
                os.setpriority(os.PRIO_PROCESS, thread, nice)


def _threads() -> list[int]:
    """The ids of this process's threads: on Linux each has a nice value of its own. Elsewhere 0, the process."""
    with suppress(OSError):
        return [int(entry.name) for entry in THREADS.iterdir()]
    return [0]
