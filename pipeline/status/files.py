"""Looking at folders of strangers, for `kdpipe status`: bounded reads, locks that are looked at and never taken for
long, bytes on disk. Nothing is written, and nothing heavy imported.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.terminal.output import printable
from store.errors import KdpipeError
from store.lock import Holder, read_holder, try_lock
from store.plain_file import open_plain, read_plain

MOST_JSON_BYTES = 2 * 2**20
MOST_TEXT = 200
MOST_MEASURED_DEPTH = 12


def read_object(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a plain file; None where there is none, or something else, or too much."""
    try:
        raw = read_plain(path, most_bytes)
        record = json.loads(raw) if len(raw) <= most_bytes else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_tail(path: Path, num_bytes: int) -> list[bytes]:
    """The last whole lines of a plain file, of its last `num_bytes`; none where it cannot be read."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - num_bytes)
            file.seek(start)
            lines = file.read(num_bytes).split(b"\n")
    except OSError:
        return []
    return lines[1:] if start else lines


def text(value: Any, most: int = MOST_TEXT) -> str:
    """A stranger's value as a short text that a terminal may be shown; empty for what is no text or number."""
    return printable(str(value)[:most]) if isinstance(value, str | int | float) else ""


def number(value: Any) -> int | None:
    """A count from a stranger's file; None for what is none."""
    return value if type(value) is int and 0 <= value < 2**50 else None


def share(value: Any) -> float | None:
    """A share from 0 to 1, such as an accuracy; None for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else None


def lock_holder(path: Path, *, ask: bool) -> Holder | None:
    """Who holds the lock file at `path`, alone or with others; None where nobody does, or nobody that can be seen.

    The kernel's own list is read first, which disturbs nobody. It does not show the locks of other machines and
    containers: with `ask` a shared lock is tried for a moment, on a descriptor that cannot write.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        holder, found = read_holder(descriptor), os.fstat(descriptor)
        # A file's device is not always told alike (overlays, btrfs): then the process must be that of the record.
        held = any(found.st_dev == device or pid == holder.pid for device, pid in locked().get(found.st_ino, ()))
        if not held and ask:
            held = not try_lock(path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, KdpipeError):
        return None
    else:
        return holder if held else None
    finally:
        os.close(descriptor)  # no child was forked: with the descriptor goes the lock


@cache
def locked() -> dict[int, list[tuple[int, int]]]:
    """By inode, the device and the process of each flock that processes of this machine hold. Read once: who looks
    again calls `locked.cache_clear()`.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields:  # an arrow is a process that waits
                major, minor, inode = fields[5].split(":")
                found.setdefault(int(inode), []).append((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return found


@dataclass
class Measure:
    """What lies in a folder: bytes of its files, and when the newest of them was written, in seconds since 1970."""

    num_bytes: int = 0
    newest: float = 0.0

    def add(self, entry: os.DirEntry[str]) -> None:
        with suppress(OSError):
            found = entry.stat(follow_symlinks=False)
            self.num_bytes += found.st_size
            self.newest = max(self.newest, found.st_mtime)


class Budget:
    """So many entries are looked at in all: a folder with millions of pictures in it must not hold up an answer."""

    def __init__(self, entries: int) -> None:
        self.left = entries
        self.unread: list[str] = []

    def entries(self, folder: Path | str, most: int | None = None) -> Iterable[os.DirEntry[str]]:
        """What is in a folder, by name; a folder that cannot be read is remembered in `unread`."""
        room = max(0, self.left if most is None else min(most, self.left))
        found: list[os.DirEntry[str]] = []
        try:
            with os.scandir(folder) as inside:
                for entry in inside:
                    if len(found) >= room:
                        break
                    found.append(entry)
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                self.unread.append(f"{printable(str(folder))}: {error.strerror or error}")
        self.left -= len(found)
        return sorted(found, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, and no link to one."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def measure(folder: Path | str, budget: Budget, into: Measure, depth: int = MOST_MEASURED_DEPTH) -> Measure:
    """Add up all files below a folder, hidden ones too."""
    for entry in budget.entries(folder):
        if not is_folder(entry):
            into.add(entry)
        elif depth:
            measure(entry.path, budget, into, depth - 1)
    return into
