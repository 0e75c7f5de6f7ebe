"""Safe reading of untrusted files: regular files of a bounded size, within a given folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from kdpipe.store.errors import KdpipeError, LinkedStoreError
from kdpipe.store.fs.atomic_write import naming

MAX_JSON_BYTES = 2 * 2**20

_followed: set[Path] = set()
"""Stores whose links may lead anywhere, as the user asked; all others may be from someone else."""


def open_regular_file(file: Path, root: Path | None = None) -> int:
    """Return an open descriptor of `file`.

    Raises OSError if it is not a regular file (a pipe would block forever), LinkedStoreError if a link leads out of the
    folder `root`, a store, and `follow_links` was not called for it.
    """
    if root is not None and not _is_within(file, root):
        raise LinkedStoreError(
            f"{file} is a link that leads out of the store, as DVC and the Hugging Face cache make them. If you trust "
            "where it leads, follow such links: `--follow-links`, in a recipe student.target_loading.follow_links = "
            f"true, in Python open_store(..., follow_links=True). Or copy what they lead to: cp -RL {root} FOLDER."
        )
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    return descriptor


def follow_links(root: Path) -> None:
    """Let this process follow links that lead out of the folder `root`: the user trusts them."""
    _followed.add(root.resolve())


def read_regular_file(file: Path, max_bytes: int, root: Path | None = None) -> bytes:
    """Return at most `max_bytes` + 1 bytes of a regular file: a longer result means that the file is too large.

    Raises OSError as `open_regular_file` does.
    """
    with naming(file), os.fdopen(open_regular_file(file, root), "rb") as opened:
        # Never allocate what an untrusted file merely claims to hold: read() allocates what it is asked for.
        return opened.read(min(max_bytes, os.fstat(opened.fileno()).st_size) + 1)


def read_json(
    path: Path, max_bytes: int, error_type: type[KdpipeError] = KdpipeError, root: Path | None = None
) -> dict[str, Any]:
    """Return the JSON object in the regular file `path`, of at most `max_bytes`; see `open_regular_file` for `root`.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no file.
        error_type: The file cannot be read, is too large, or is not a JSON object; the text names it and the reason.
    """
    try:
        raw = read_regular_file(path, max_bytes, root)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise error_type(f"{path} cannot be read ({error.strerror}).") from error
    return parse_json(raw, str(path), max_bytes, error_type)


def parse_json(raw: bytes, where: str, max_bytes: int, error_type: type[KdpipeError]) -> dict[str, Any]:
    """Parse a JSON object of at most `max_bytes`. Raises `error_type`, naming the file `where`, for anything else."""
    if len(raw) > max_bytes:
        raise error_type(f"{where} is damaged: it has more than {max_bytes:,} bytes.")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{where} is damaged: {str(error)[:200]}.") from error
    if not isinstance(record, dict):
        raise error_type(f"{where} is damaged: it is not a JSON object.")
    return record


def _is_within(file: Path, root: Path) -> bool:
    try:
        folder = root.resolve()
        return folder in _followed or file.resolve().is_relative_to(folder)
    except RuntimeError:  # a loop of links
        return False
