"""Map errors to the exit status of kdpipe."""

from __future__ import annotations

from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.store import FingerprintMismatch, KdpipeError, LockedError

DONE = 0
FAILED = 1
USAGE = 2
DONE_IN_PART = 3
LOCKED = 11
FINGERPRINT_MISMATCH = 12
STOPPED_EARLY = 75
INTERRUPTED = 130


def exit_code(error: BaseException) -> int:
    """Return the exit status for an error."""
    for kind, code in (
        (StoppedEarly, STOPPED_EARLY),
        (RecipeError, USAGE),
        (FingerprintMismatch, FINGERPRINT_MISMATCH),
        (LockedError, LOCKED),
        (KeyboardInterrupt, INTERRUPTED),
        (KdpipeError, FAILED),
    ):
        if isinstance(error, kind):
            return code
    return FAILED


def process_exit_code(error: BaseException) -> int:
    """Return the exit status of a process that an exception ends, typer.Exit and SystemExit included."""
    code = getattr(error, "exit_code", getattr(error, "code", None))
    if isinstance(code, int):
        return code
    return DONE if isinstance(error, SystemExit) and code is None else exit_code(error)
