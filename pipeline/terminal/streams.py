"""The standard streams where they are closed, full, or no longer read. Imports nothing heavy."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

STDOUT = "standard output"
"""The file name in errors of writing to stdout, which have none of their own."""


class NamedOutput(io.FileIO):
    """Stdout's file: its first error is named, and what is printed after that is discarded."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.fileno())
            os.close(sink)
            raise


def set_up_streams() -> None:
    """Open /dev/null in place of closed streams, whose numbers the next files would get; name the errors of stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    if sys.stderr is None:
        sys.stderr = _text(io.FileIO(2, "w", closefd=False), "backslashreplace")
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.stdout = _text(NamedOutput(1, "w", closefd=False), getattr(sys.stdout, "errors", "strict"))


def _text(raw: io.FileIO, errors: str) -> io.TextIOWrapper:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty())
