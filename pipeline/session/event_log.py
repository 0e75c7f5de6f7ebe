"""Write `events.jsonl` in a run folder: one JSON object a line, for `kdpipe status` and other tools.

It is always written and never ends a job: a write error is reported once and the job goes on. Several processes append
to one file. Its length is not bounded: about 200 bytes an epoch and 200 bytes each 10 s, a few MB in a week.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kdpipe.pipeline.terminal.exit_codes import process_exit_code
from kdpipe.pipeline.terminal.output import print_warning
from kdpipe.pipeline.terminal.reporter import Throttle, json_text, utc_now
from kdpipe.stages.runtime.events import WARNING, ProgressEvent
from kdpipe.store.fs.lock import JOB_ID_VARIABLES

EVENTS = "events.jsonl"
EVERY_S = 10.0
"""Interval between the events of a job; events with metrics are always written."""

MAX_LINE_BYTES = 64 * 1024
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def job_id() -> str | None:
    """Return the job number of the batch system, if there is one."""
    return next((os.environ[name] for name in JOB_ID_VARIABLES if os.environ.get(name)), None)


class EventLog:
    """A reporter that appends events to a file. Thread-safe."""

    def __init__(self, path: Path, command: str, rank: int | None) -> None:
        self._path = path
        self._process: dict[str, object] = {"command": command, "pid": os.getpid(), "host": socket.gethostname()}
        self._process |= {} if rank is None else {"rank": rank}
        self._throttle = Throttle(EVERY_S)
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._has_warned = self._has_ended = False

    def __call__(self, event: ProgressEvent) -> None:
        if self._throttle.allow(event) or event.metrics:
            kind = "warning" if event.unit == WARNING else "progress"
            self._write({"kind": kind, **vars(event), "metrics": dict(event.metrics)})

    def begin(self) -> None:
        """Write the first line of a process."""
        self._write({"kind": "begin", **({"job_id": job_id()} if job_id() else {})})

    def end(self, code: int) -> None:
        """Write the last line, with the exit status. A second call, or one in a forked child, does nothing."""
        if not self._has_ended and os.getpid() == self._process["pid"]:
            self._has_ended = True
            self._write({"kind": "end", "exit_code": code})

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _write(self, record: Mapping[str, object]) -> None:
        line = json_text({"time": utc_now(), **self._process, **record}).encode()
        if len(line) > MAX_LINE_BYTES:
            line = json_text({"time": utc_now(), **self._process, **record, "job": "", "metrics": {}}).encode()
        try:
            with self._lock:
                self._append(line + b"\n")
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                print_warning(f"{self._path} cannot be written ({error.strerror or error}); the job goes on.")

    def _append(self, line: bytes) -> None:
        """Append a line with one write, so that lines of several processes do not mix on a local file system."""
        if self._descriptor is None:
            self._descriptor = _open(self._path)
        if os.write(self._descriptor, line) < len(line):  # the disk became full: start a new line next time
            self.close()
            raise OSError("only a part of a line was written")


def _open(path: Path) -> int:
    """Open the file for appending, after completing a line that a killed writer left unfinished."""
    with ExitStack() as on_error:
        descriptor = os.open(path, FLAGS, 0o666)
        on_error.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":
            os.write(descriptor, b"\n")
        on_error.pop_all()
    return descriptor


@contextmanager
def event_log(folder: Path, command: str, *, rank: int | None = None) -> Iterator[EventLog]:
    """Log the events of a job in the run folder `folder`, which must exist.

    The first line is a `begin`; the last is an `end` with the exit status: that of the exception that leaves the block,
    0 without one, or what was passed to `end` before. `rank` is the number of this process, if several do one job.
    File errors never raise.
    """
    log = EventLog(folder / EVENTS, command, rank)
    log.begin()
    try:
        yield log
    except BaseException as error:
        log.end(process_exit_code(error))
        raise
    else:
        log.end(0)
    finally:
        log.close()
