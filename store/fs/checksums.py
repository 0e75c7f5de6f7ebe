"""The sha256 of files, in a SHA256SUMS in their folder that `sha256sum -c` reads too.

A sum is recorded when a file is made, and checked when the file is read. While a file is replaced, SHA256SUMS has the
sums of both the old and the new one, so that a job killed at any moment leaves no file without its sum. Folders without
SHA256SUMS, and files that it does not list, are not checked: they come from elsewhere, or from an older kdpipe.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.store.errors import KdpipeError
from kdpipe.store.fs.atomic_write import fsync_path, write_atomically
from kdpipe.store.fs.safe_read import MAX_JSON_BYTES, open_regular_file, read_json, read_regular_file

SUMS = "SHA256SUMS"
MAX_BYTES = 2**20
JOB = "job.json"
"""The file that every folder of a job has."""

RESTARTED = ("checkpoint.safetensors", "start.safetensors")
"""Files without which a job starts again."""

LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0-\x1f]+)\n?")

Sums = Mapping[str, tuple[str, ...]]
"""The sums by file name: one, or several while the file is being replaced."""


class DamagedFileError(KdpipeError):
    """A file that is not as it was written: damaged, or edited by hand.

    Attributes:
        path: The file.
        why: What is wrong.
        advice: What to do.
    """

    def __init__(self, path: Path, why: str) -> None:
        # A job's files belong together: all but those that the job itself makes again are replaced with the folder.
        is_of_job = (path.parent / JOB).exists() and path.name not in RESTARTED
        remedy = f"the folder {path.parent}" if is_of_job else "it"
        self.path, self.why = path, why
        self.advice = f"Restore it from a copy, or delete {remedy} and run the same command again."
        super().__init__(f"{path} is damaged or was edited: {why}. {self.advice}")


def write_with_sum(path: Path, *parts: bytes | memoryview) -> None:
    """Write the concatenated `parts` to the file `path` atomically, and record its sum.

    Only one process at a time may write into the folder.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    before, found = read_sums(path.parent), digest.hexdigest()
    old = before.get(path.name, ())
    if old != (found,):
        _write_sums(path.parent, {**before, path.name: (*old, found)})
    write_atomically(path, *parts)
    if len(old) and old != (found,):
        _write_sums(path.parent, {**before, path.name: (found,)})


def record_sums(folder: Path) -> None:
    """Record the sums of all files in a folder as they are now."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != SUMS]
    _write_sums(folder, {path.name: (file_sha256(path),) for path in files})


def move_with_sums(source: Path, target: Path, last: str) -> None:
    """Move the files that a folder's SHA256SUMS lists into another folder, with their sums, the file `last` at the end.

    A job killed meanwhile leaves no file without its sum.
    """
    old, new = read_sums(target), read_sums(source)
    _write_sums(target, {**old, **{name: (*old.get(name, ()), *known) for name, known in new.items()}})
    for name in sorted(new, key=lambda name: (name == last, name)):
        (source / name).replace(target / name)
    fsync_path(target)
    _write_sums(target, {**old, **new})


def remove_with_sum(path: Path) -> None:
    """Remove a file, if it exists, and its sum: the sum first, so that no killed job leaves a sum without a file."""
    sums = read_sums(path.parent)
    if path.name in sums:
        _write_sums(path.parent, {name: known for name, known in sums.items() if name != path.name})
    path.unlink(missing_ok=True)


def require_intact(path: Path) -> None:
    """Raise DamagedFileError if a file differs from its recorded sum. A file that does not exist is no damage here."""
    if (known := read_sums(path.parent).get(path.name)) and path.exists():
        _compare(path, known)


def damages(folder: Path) -> Iterator[DamagedFileError]:
    """Yield what is wrong with the files that a folder's SHA256SUMS lists."""
    try:
        listed = read_sums(folder)
    except DamagedFileError as error:
        yield error
        return
    for name, known in listed.items():
        try:
            _compare(folder / name, known)
        except DamagedFileError as error:
            yield error


def read_intact_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Return the JSON object in the file `path`; None if there is none, it is damaged, or it is too large."""
    try:
        require_intact(path)
        return read_json(path, max_bytes)
    except (OSError, KdpipeError):
        return None


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a regular file."""
    with os.fdopen(open_regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: Path) -> Sums:
    """Return the sums recorded in a folder; none without SHA256SUMS. Raises DamagedFileError if that is damaged."""
    path = folder / SUMS
    try:
        raw = read_regular_file(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DamagedFileError(path, f"it cannot be read ({error.strerror})") from error
    sums: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(io.BytesIO(raw), 1):
        if (found := LINE.fullmatch(line.decode(errors="replace"))) is None:
            raise DamagedFileError(path, f"its line {number} is not a sha256 and a file name")
        sums[found[2]] = (*sums.get(found[2], ()), found[1])
    return sums


def _write_sums(folder: Path, sums: Sums) -> None:
    lines = [f"{known}  {name}\n" for name in sorted(sums) for known in sums[name]]
    write_atomically(folder / SUMS, "".join(lines).encode())


def _compare(path: Path, known: Iterable[str]) -> None:
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise DamagedFileError(path, f"it is missing, and {SUMS} beside it lists it") from None
    except OSError as error:
        raise DamagedFileError(path, f"it cannot be read ({error.strerror})") from error
    if found not in known:
        wanted = " or ".join(f"{one[:12]}..." for one in known)
        raise DamagedFileError(path, f"its sha256 is {found[:12]}..., and {SUMS} beside it has {wanted}")
