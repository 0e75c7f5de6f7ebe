"""`events.jsonl` in a run folder: what happened there, one JSON object a line, for `kdpipe status` and for tools.

Always written, and never in the way: what the disk refuses is told once and the job goes on. Several processes append
to one file. Its length is not bounded: about 200 bytes an epoch and 200 bytes each 10 s, a few MB in a week.
"""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.terminal.exit_codes import exit_code
from stages.watch import WARNING, Event
from store.lock import JOB_ID_VARIABLES

EVENTS = "events.jsonl"
EVERY_S = 10.0
"""A job that goes on is written down so often, and besides whenever there are figures."""

MOST_LINE_BYTES = 64 * 1024
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Reporter = Callable[[Event], None]


def is_last(event: Event) -> bool:
    """Whether nothing more will come of a job: training reports its last step once more, with the epoch's figures."""
    return event.step == event.total and (bool(event.metrics) or event.unit != "step")


def to_all(*reporters: Reporter) -> Reporter:
    """One reporter that hands each event to several."""

    def report(event: Event) -> None:
        for reporter in reporters:
            reporter(event)

    return report


class Spacing:
    """Lets through a job's first event, its last, and in between one every `every_s` seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._passed: dict[tuple[str, str], float] = {}

    def lets_through(self, event: Event) -> bool:
        now = time.monotonic()
        if event.unit == WARNING:
            return True
        last = self._passed.get((event.stage, event.job))
        if last is None or is_last(event) or now - last >= self._every_s:
            self._passed[event.stage, event.job] = now
            return True
        return False


def utc_now() -> str:
    """This moment as ISO 8601, in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON, in one line without `indent`: what is not finite becomes null, what JSON does not know its text."""
    try:
        return json.dumps(record, allow_nan=False, default=str, indent=indent)
    except (ValueError, RecursionError):
        return json.dumps(_finite(record), allow_nan=False, default=str, indent=indent)


def _finite(value: Any, depth: int = 8) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping) and depth:
        return {str(name): _finite(one, depth - 1) for name, one in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_finite(one, depth - 1) for one in value]
    return value if isinstance(value, str | int | None) else str(value)[:200]


class EventLog:
    """Appends to a file of events. Called with an event, from any thread."""

    def __init__(self, path: Path, command: str, rank: int | None) -> None:
        self._path = path
        self._who = {"command": command, "pid": os.getpid(), "host": socket.gethostname()}
        self._who |= {} if rank is None else {"rank": rank}
        self._spacing = Spacing(EVERY_S)
        self._writing = threading.Lock()
        self._descriptor: int | None = None
        self._has_told = self._has_ended = False

    def __call__(self, event: Event) -> None:
        if self._spacing.lets_through(event) or event.metrics:
            kind = "warning" if event.unit == WARNING else "progress"
            self._write({"kind": kind, **vars(event), "metrics": dict(event.metrics)})

    def began(self) -> None:
        """The first line: a process is at work in the folder."""
        job_id = next((os.environ[name] for name in JOB_ID_VARIABLES if os.environ.get(name)), None)
        self._write({"kind": "begin", **({} if job_id is None else {"job_id": job_id})})

    def ended(self, code: int) -> None:
        """The last line, with the exit status. A second call does nothing, nor does one in a forked child."""
        if not self._has_ended and os.getpid() == self._who["pid"]:
            self._has_ended = True
            self._write({"kind": "end", "exit_code": code})

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json_text({"time": utc_now(), **self._who, **record}).encode()
        if len(line) > MOST_LINE_BYTES:
            line = json_text({"time": utc_now(), **self._who, **record, "job": "", "metrics": {}}).encode()
        try:
            with self._writing:
                self._append(line + b"\n")
        except OSError as error:
            self._tell(error)

    def _append(self, line: bytes) -> None:
        """One write: what several processes append stays line by line, on any local file system."""
        if self._descriptor is None:
            self._descriptor = _open(self._path)
        if os.write(self._descriptor, line) < len(line):  # the disk is full in mid-line: go on with a new one
            self.close()
            raise OSError("only a part of a line was written")

    def _tell(self, error: OSError) -> None:
        if not self._has_told:
            self._has_told = True
            with suppress(OSError, ValueError):
                why = error.strerror or error
                print(f"kdpipe: warning: {self._path} cannot be written ({why}); the job goes on.", file=sys.stderr)  # noqa: T201


def _open(path: Path) -> int:
    """The file, to append to, at the beginning of a line: a killed writer may have left a piece of one."""
    descriptor = os.open(path, FLAGS, 0o666)
    try:
        num_bytes = _plain_bytes(descriptor)
        if num_bytes and os.pread(descriptor, 1, num_bytes - 1) != b"\n":
            os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _plain_bytes(descriptor: int) -> int:
    """The size of an open file; OSError where it is no plain one."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no plain file")
    return found.st_size


@contextmanager
def event_log(folder: Path, command: str, *, rank: int | None = None) -> Iterator[EventLog]:
    """The events of a job in the run folder `folder`, which must exist. `rank`: of several processes of one job.

    It begins with a line `begin`, and ends with a line `end` and the exit status: that of the exception that leaves
    the block, 0 without one, or what `ended` was told before. Never raises because of the file.
    """
    log = EventLog(folder / EVENTS, command, rank)
    log.began()
    try:
        yield log
    except BaseException as error:
        log.ended(exit_code_of(error))
        raise
    else:
        log.ended(0)
    finally:
        log.close()


def exit_code_of(error: BaseException) -> int:
    """The exit status of a process that an exception ends; of typer's and Python's own way out, what they say."""
    code = getattr(error, "exit_code", getattr(error, "code", None))
    if isinstance(code, int):
        return code
    return 0 if isinstance(error, SystemExit) and code is None else exit_code(error)
