"""Reading a file that a stranger may have made: a plain file within the store, of a size that was expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular_file(file: Path, root: Path | None = None) -> int:
    """An open descriptor of `file`. Raises OSError where it is no plain file (a pipe would wait for ever), or where a
    link leads out of the folder `root`.
    """
    if root is not None and not _is_within(file, root):
        raise OSError(errno.ELOOP, "it is a link that leads out of the store", str(file))
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(file))
    return descriptor


def read_regular_file(file: Path, max_bytes: int, root: Path | None = None) -> bytes:
    """The bytes of a plain file, at most `most_bytes` + 1 of them: a longer result says that the file is too large.

    Raises OSError as `open_regular_file` does.
    """
    with os.fdopen(open_regular_file(file, root), "rb") as opened:
        # A read makes room for all that it is asked for: what a foreign file only claims to hold takes no memory.
        return opened.read(min(max_bytes, os.fstat(opened.fileno()).st_size) + 1)


def _is_within(file: Path, root: Path) -> bool:
    try:
        return file.resolve().is_relative_to(root.resolve())
    except RuntimeError:  # links that lead to each other
        return False
