"""Read untrusted run and store folders: bounded reads, locks that are only probed, sizes on disk. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kdpipe.pipeline.terminal.output import printable
from kdpipe.store.fs.safe_read import open_regular_file

MAX_TEXT = 200
MAX_MEASURED_DEPTH = 12


def read_tail(path: Path, num_bytes: int) -> list[bytes]:
    """Return the complete lines among the last `num_bytes` of a regular file; none if it cannot be read."""
    try:
        with os.fdopen(open_regular_file(path), "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - num_bytes)
            file.seek(start)
            lines = file.read(num_bytes).split(b"\n")
    except OSError:
        return []
    return lines[1:] if start else lines


def text(value: Any) -> str:
    """Return an untrusted value as a short printable text; empty if it is neither text nor number."""
    return printable(str(value)[:MAX_TEXT]) if isinstance(value, str | int | float) else ""


def number(value: Any) -> int | None:
    """Return an untrusted value if it is a count, else None."""
    return value if type(value) is int and 0 <= value < 2**50 else None


@dataclass
class Measure:
    """Total size of a folder's files, and the time of the newest in seconds since 1970."""

    num_bytes: int = 0
    newest: float = 0.0

    def add(self, entry: os.DirEntry[str]) -> None:
        with suppress(OSError):
            found = entry.stat(follow_symlinks=False)
            self.num_bytes += found.st_size
            self.newest = max(self.newest, found.st_mtime)


class Budget:
    """A limit on the number of directory entries read, so that millions of files do not delay an answer."""

    def __init__(self, entries: int) -> None:
        self.left = entries
        self.unread: list[str] = []

    def entries(self, folder: Path | str, limit: int | None = None) -> Iterable[os.DirEntry[str]]:
        """Return the entries of a folder, sorted by name; errors are collected in `unread`."""
        found: list[os.DirEntry[str]] = []
        try:
            with os.scandir(folder) as inside:
                found += islice(inside, max(0, self.left if limit is None else min(limit, self.left)))
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                self.unread.append(f"{printable(str(folder))}: {error.strerror or error}")
        self.left -= len(found)
        return sorted(found, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, not a link to one."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def measure(folder: Path | str, budget: Budget, into: Measure, depth: int = MAX_MEASURED_DEPTH) -> Measure:
    """Add up all files below a folder, hidden ones included."""
    for entry in budget.entries(folder):
        if not is_folder(entry):
            into.add(entry)
        elif depth:
            measure(entry.path, budget, into, depth - 1)
    return into
