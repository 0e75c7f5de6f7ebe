"""Damaged and hostile files, to test the errors of commands that read them."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import Result

from support.kdpipe_process import kdpipe_here

ESCAPE = "\x1b[31m\u202e<script>"
DEEP = '{"a":' * 10**5 + "1" + "}" * 10**5
PLACES = ("folder", "pipe", "circle", "zeros", "passwords")
"""What `put` can create in the place of a file."""

NO_RECORDS = (*PLACES, "", b"\x80\xff\x00", "[]", "null", "{}", DEEP, '{"a": ' + "9" * 10**4 + "}")
WAIT_S = 60


class Timeout(BaseException):
    """A timeout; not an Exception, so that no command catches it."""


class Touch:
    """Creates a file when unpickled, as a stand-in for hostile code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@contextmanager
def in_time() -> Iterator[None]:
    """Raise Timeout if the block takes too long."""

    def end(*_: object) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(WAIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(*arguments: str | Path) -> Result:
    """Run a command with a time limit."""
    with in_time():
        return kdpipe_here(*arguments)


def refused(*arguments: str | Path, code: int = 1) -> str:
    """Run a command that must fail with one error line and the exit code `code`; return the line."""
    ended = answer(*arguments)
    assert isinstance(ended.exception, SystemExit), (arguments, ended.exception)
    assert ended.exit_code == code, (ended.stdout, ended.stderr)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("kdpipe: ")]
    errors = [line for line in lines if not line.startswith("kdpipe: warning: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("kdpipe: error: ")
    assert errors[0].isprintable()
    assert len(errors[0]) < 1000
    assert [word for word in ("Traceback", "Errno", "Warning") if word in ended.stderr] == []
    return errors[0]


def put(path: Path, what: str | bytes) -> None:
    """Replace a file by bytes, text, or one of PLACES."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "circle":
        path.symlink_to(path.name)
    elif what == "zeros":
        path.symlink_to("/dev/zero")
    elif what == "passwords":
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(what if isinstance(what, bytes) else what.encode())


def with_value(good: bytes, path: tuple[str | int, ...], value: object) -> str:
    """Return a JSON record with the value at `path` replaced."""
    record = parent = json.loads(good)
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return json.dumps(record)
