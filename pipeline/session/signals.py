"""When a job is to stop: at a signal, or by the clock. The loops finish their step, save, and end; a second SIGINT
aborts at once. What has nothing to save stops at the signal itself.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

IMPORTED = time.monotonic()

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What batch systems, people and closing terminals send. SIGHUP only where `nohup` has not taken it away."""

UNIT_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}

Handler = Callable[[int, FrameType | None], Any]


def process_age_s() -> float:
    """Seconds since this process was started; where the kernel does not tell, since this file was imported."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - IMPORTED


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 3h30m, 1d, 90m or 45s, or as Slurm writes it: [D-]HH:MM:SS or D-HH.

    Raises ValueError, with a sentence, for anything else, and for no time at all.
    """
    as_units = re.fullmatch(r"(?a)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    as_slurm = re.fullmatch(r"(?a)(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    found = as_slurm or as_units
    counts = [int(count or 0) for count in found.groups()] if found and len(text) <= 32 else []
    wall_s = sum(count * unit_s for count, unit_s in zip(counts, UNIT_S.values(), strict=False))
    if wall_s <= 0:
        raise ValueError(f"{text[:40]!r} is no duration: write 3h30m, 90m, 1d12h or 45s, or HH:MM:SS as Slurm does.")
    return wall_s


class Stop:
    """Whether this job is to stop, when called; `reason` says why, for people."""

    def __init__(self, most_s: float | None) -> None:
        self.reason: str | None = None
        self._most_s = most_s
        self._at = None if most_s is None else time.monotonic() + most_s - process_age_s()

    def __call__(self) -> bool:
        if self.reason is None and self._at is not None and time.monotonic() >= self._at:
            self.reason = f"after {self._most_s:.0f} s, as --max-duration says"
        return self.reason is not None


@contextmanager
def stop_when_asked(most_s: float | None = None) -> Iterator[Stop]:
    """Within the block, the yielded flag is set by a signal, and when the process is `most_s` seconds old.

    A StoppedEarly that leaves the block says why. Raises KeyboardInterrupt at a second SIGINT.
    """
    from stages.errors import StoppedEarly

    stop, interrupts = Stop(most_s), 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        stop.reason = stop.reason or f"at {signal.Signals(number).name}"

    with _handled_by(handle):
        try:
            yield stop
        except StoppedEarly as error:
            raise StoppedEarly(stop.reason or "as asked") from error


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Within the block, a signal ends the command where it stands: for what writes nothing, or nothing in part.

    Raises StoppedEarly, saying at which signal.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        from stages.errors import StoppedEarly

        raise StoppedEarly(f"at {signal.Signals(number).name}")

    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main one may have signals
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
