"""Read untrusted run and store folders: bounded reads, locks that are only looked at, sizes on disk. Writes nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kdpipe.pipeline.terminal.output import printable
from kdpipe.store.errors import KdpipeError
from kdpipe.store.fs.lock import Holder, read_holder, try_lock
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


def text(value: Any, max_length: int = MAX_TEXT) -> str:
    """Return an untrusted value as a short printable text; empty if it is neither text nor number."""
    return printable(str(value)[:max_length]) if isinstance(value, str | int | float) else ""


def number(value: Any) -> int | None:
    """Return an untrusted value if it is a count, else None."""
    return value if type(value) is int and 0 <= value < 2**50 else None


def fraction(value: Any) -> float | None:
    """Return an untrusted value if it is a number from 0 to 1, else None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else None


def lock_holder(path: Path, *, try_it: bool) -> Holder | None:
    """Return who holds the lock file at `path`, exclusively or shared; None if it is free or this cannot be seen.

    Reads the kernel's list of locks first, which disturbs no one. The list lacks locks of other machines and
    containers: with `try_it` a shared lock is tried for a moment, on a read-only descriptor.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        holder, found = read_holder(descriptor), os.fstat(descriptor)
        # The device number may differ (overlays, btrfs): then the process must be that of the lock's record.
        is_held = any(found.st_dev == device or pid == holder.pid for device, pid in locked().get(found.st_ino, ()))
        if not is_held and try_it:
            is_held = not try_lock(path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, KdpipeError):
        return None
    else:
        return holder if is_held else None
    finally:
        os.close(descriptor)  # releases the lock


@cache
def locked() -> dict[int, list[tuple[int, int]]]:
    """Return device and process of each flock held on this machine, by inode. Cached until `locked.cache_clear()`."""
    found: dict[int, list[tuple[int, int]]] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields:  # an arrow marks a waiting process
                major, minor, inode = fields[5].split(":")
                found.setdefault(int(inode), []).append((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return found


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
        room = max(0, self.left if limit is None else min(limit, self.left))
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
