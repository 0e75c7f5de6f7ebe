"""Stop a job at a signal or by the clock: loops finish their step and save; a second SIGINT aborts at once."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What batch systems, users and closing terminals send. SIGHUP only where `nohup` does not ignore it."""

UNIT_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}

EXIT_STATUS = 75
"""As in terminal/exit_codes.py, whose imports take too long here."""

AGAIN = "; all finished work is saved. Run the same command again to continue."

Handler = Callable[[int, FrameType | None], Any]


def process_age_s() -> float:
    """Return the seconds since this process started."""
    import psutil

    return time.time() - psutil.Process().create_time()


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 3h30m, 1d, 90m or 45s, or in Slurm's form [D-]HH:MM:SS.

    Raises:
        ValueError: If it is neither, or zero.
    """
    as_units = re.fullmatch(r"(?a)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    as_slurm = re.fullmatch(r"(?a)(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    found = as_slurm or as_units
    counts = [int(count or 0) for count in found.groups()] if found and len(text) <= 32 else []
    duration_s = sum(count * unit_s for count, unit_s in zip(counts, UNIT_S.values(), strict=False))
    if duration_s <= 0:
        raise ValueError(f"{text[:40]!r} is not a duration: write 3h30m, 90m, 1d12h or 45s, or HH:MM:SS as in Slurm.")
    return duration_s


class StopFlag:
    """A callable that returns whether the job should stop; `reason` is the end of "stopped early ..."."""

    def __init__(self, max_duration_s: float | None) -> None:
        self.reason: str | None = None
        self._max_duration_s = max_duration_s
        self._deadline = None if max_duration_s is None else time.monotonic() + max_duration_s - process_age_s()

    def __call__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"after {self._max_duration_s:.0f} s (--max-duration)"
        return self.reason is not None


@contextmanager
def handle_signals(max_duration_s: float | None = None) -> Iterator[StopFlag]:
    """Yield a flag that is set by a signal, or when the process is `max_duration_s` old.

    Raises:
        StoppedEarly: With the reason, if one leaves the block.
        KeyboardInterrupt: At a second SIGINT.
    """
    from kdpipe.stages.errors import StoppedEarly

    stop, num_interrupts = StopFlag(max_duration_s), 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += number == signal.SIGINT
        if num_interrupts > 1:
            raise KeyboardInterrupt
        stop.reason = stop.reason or f"at {signal.Signals(number).name}"

    with signal_handlers(handle):
        try:
            yield stop
        except StoppedEarly as error:
            raise StoppedEarly(stop.reason or "on request") from error


def exit_at_signals() -> None:
    """End this process at once at a signal, with the exit status of a stopped job: before a command handles signals."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"kdpipe: stopped early at {name}{AGAIN}\n".encode())
        os._exit(EXIT_STATUS)  # an exception would end up in whatever is being imported

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Raise StoppedEarly at a signal within the block: for commands that have nothing to save."""

    def handle(number: int, frame: FrameType | None) -> None:
        from kdpipe.stages.errors import StoppedEarly

        raise StoppedEarly(f"at {signal.Signals(number).name}")

    with signal_handlers(handle):
        yield


@contextmanager
def signal_handlers(handle: Handler) -> Iterator[None]:
    """Call `handle` at the signals of `SIGNALS` within the block."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    is_hup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in SIGNALS if number != signal.SIGHUP or not is_hup_ignored]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
