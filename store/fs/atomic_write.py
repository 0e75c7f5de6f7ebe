"""Atomic file writes: written to a temporary file, fsynced, renamed, and the folder fsynced.

kdpipe writes all its files this way: a job killed at any moment leaves only whole files and at most a temporary one,
which the next job removes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the concatenated `parts` to the file `path`: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        with naming(path), temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):  # such as EISDIR
            error.filename = str(path)
        raise
    fsync_path(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError inside the block the file name `path` if it has none, as those of open files do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable: without the latter a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folders: Iterable[Path]) -> None:
    """Create folders with their parents, each made durable in its own parent."""
    for folder in folders:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for created in missing:
            fsync_path(created.parent)


def sweep_partial(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`, a file or a whole folder. Only its lock's holder may."""
    beside = path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}") if path.parent.exists() else ()
    inside = path.rglob(f".*{PARTIAL_SUFFIX}") if path.is_dir() else ()
    for leftover in [*beside, *inside]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
