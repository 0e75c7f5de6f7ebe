"""Damaged and hostile files for the tests of what commands say of them, and how a command has to refuse."""

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
"""What may stand in the place of a file, as `put` knows it."""

NO_RECORDS = (*PLACES, "", b"\x80\xff\x00", "[]", "null", "{}", DEEP, '{"a": ' + "9" * 10**4 + "}")
WAIT_S = 60


class WaitsForEver(BaseException):
    """No error that a command would turn into a sentence."""


class Touch:
    """Unpickled, it makes a file: a stand-in for what a stranger might do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@contextmanager
def in_time() -> Iterator[None]:
    """End the block by WaitsForEver where it would not end by itself."""

    def end(*_: object) -> None:
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(WAIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(*arguments: str | Path) -> Result:
    """What a command says; a test fails where it waits for what never comes."""
    with in_time():
        return kdpipe_here(*arguments)


def refused(*arguments: str | Path, code: int = 1) -> str:
    """What a command says that refuses: one sentence, and an exit status."""
    ended = answer(*arguments)
    assert isinstance(ended.exception, SystemExit), (arguments, ended.exception)
    assert ended.exit_code == code, (ended.stdout, ended.stderr)
    said = [line for line in ended.stderr.splitlines() if line.startswith("kdpipe: ")]
    assert len(said) == 1, said
    assert said[0].startswith("kdpipe: error: ")
    assert said[0].isprintable()
    assert len(said[0]) < 1000
    assert [word for word in ("Traceback", "Errno", "Warning") if word in ended.stderr] == []
    return said[0]


def put(path: Path, what: str | bytes) -> None:
    """Put something else in the place of a file: bytes, text, or one of PLACES."""
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
    """A JSON record with another value at its place."""
    record = at = json.loads(good)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(record)
