"""Errors that a user can fix: each is one clear sentence, shown without a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from kdpipe.store.redact import redacted_json


class KdpipeError(Exception):
    """An error that the user can fix: it says what is wrong, where, stored against wanted, and what to do next.

    URLs in its text lose their passwords and queries.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*map(redacted_json, arguments))


class StoreError(KdpipeError):
    """An unusable target store: damaged, incomplete, or not a store at all."""


class LinkedStoreError(StoreError):
    """A store with links that lead out of it, which are followed only where the user asks for it."""


MAX_SHOWN, MAX_VALUE_LENGTH = 4, 80
"""Differences that a message shows, and letters of each of their values."""


class FingerprintMismatch(KdpipeError):
    """A mismatch between the inputs that made something on disk and the ones wanted now.

    Attributes:
        differences: (key, stored, wanted) for each value that differs; the message shows the first few.
    """

    def __init__(self, what: str, differences: Sequence[tuple[str, Any, Any]], advice: str) -> None:
        self.differences = tuple((key, *redacted_json((stored, wanted))) for key, stored, wanted in differences)
        told = sorted((one for one in self.differences if "sha256" not in one[0]), key=lambda one: None in one)
        told = told or list(self.differences)  # digests tell nothing where a setting differs too
        pairs = "; ".join(
            f"{key}: stored {_shorten(stored, wanted)}, wanted {_shorten(wanted, stored)}"
            for key, stored, wanted in told[:MAX_SHOWN]
        )
        pairs += f"; and {len(told) - MAX_SHOWN} more differences" if len(told) > MAX_SHOWN else ""
        if any(key.endswith("source_sha256") and stored and wanted for key, stored, wanted in differences):
            advice = f"The source of the user's code, or of a module that it imports, was edited. {advice}"
        super().__init__(f"{what} was made from other inputs - {pairs}. {advice}")


def _shorten(value: Any, other: Any) -> str:
    """Return the repr of a value, without what a list begins with as the `other` does, cut if it is long."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(value, other, strict=False)))
        text = f"[{'..., ' if same else ''}{', '.join(map(repr, value[same:]))}]"
    else:
        text = repr(value)
    if re.fullmatch("'[0-9a-f]{64}'", text):
        return f"{text[:13]}...'"
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    if isinstance(value, Mapping | list | tuple) and "{" in text:  # a part of an object tells nothing
        return f"{len(value)} entries"
    count = f"{len(value)} values, " if isinstance(value, list | tuple) else ""
    return f"{count}{text[: MAX_VALUE_LENGTH - 3]}..."


def differences(stored: Any, wanted: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return the leaves at which two JSON values differ, as (dotted key, stored, wanted); an absent one is None."""
    if isinstance(stored, list | tuple) and isinstance(wanted, list | tuple) and len(stored) == len(wanted):
        stored, wanted = dict(enumerate(stored)), dict(enumerate(wanted))
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*stored, *wanted})
        return [
            pair
            for name in names
            for pair in differences(stored.get(name), wanted.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if stored == wanted else [(key, stored, wanted)]


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 1, otherwise: str | None = None) -> str:
    """Return "did you mean 'x'?" with the known names nearest to a wrong one, at most `limit`, regardless of case.

    If none is near, return `otherwise`, by default the known names.
    """
    by_lower = {word.lower(): word for word in known}
    if near := get_close_matches(name.lower(), by_lower, limit, 0.5):
        return f"did you mean {' or '.join(repr(by_lower[word]) for word in near)}?"
    return f"available: {', '.join(by_lower.values()) or 'none'}." if otherwise is None else otherwise


DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "remove files of yours, or ask for a larger quota"),
    errno.EROFS: ("the file system is read-only", "have it mounted for writing, or use a folder on another one"),
    errno.EIO: ("the disk reports an error", "look at the system's log (dmesg), and use another disk if it is failing"),
    errno.ESTALE: ("the file system is gone", "have it mounted again"),
    errno.ENOTCONN: ("the file system is gone", "have it mounted again"),
}
"""By errno, what is wrong with a disk, and what to do next."""


def explain(error: OSError) -> tuple[str, str]:
    """Return what is wrong with a file or its disk, and what to do next."""
    return DISK_ERRORS.get(error.errno or 0, (error.strerror or str(error), "make it a file that you may write"))


@contextmanager
def translate_os_errors(
    message: Callable[[OSError], str], error_type: type[KdpipeError] = StoreError
) -> Iterator[None]:
    """Raise `error_type(message(error))` in place of an OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise error_type(message(error)) from error
