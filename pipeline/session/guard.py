"""Turn errors of a command into one sentence on stderr and an exit status. Imports nothing heavy unless one occurs."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from kdpipe.pipeline.session.signals import AGAIN, exit_on_signal
from kdpipe.pipeline.terminal.output import Verbosity, print_line, verbosity
from kdpipe.pipeline.terminal.streams import STDOUT
from kdpipe.store.errors import DISK_ERRORS, explain
from kdpipe.store.redact import redacted


class RedactingGroup(TyperGroup):
    """A group of commands whose usage errors, which quote the command line, lose the secrets of URLs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:  # typer's own copy of click's exceptions, or click's
            if isinstance(message := getattr(error, "message", None), str):
                error.message = redacted(message)  # type: ignore[attr-defined]
            raise


@contextmanager
def guarded() -> Iterator[None]:
    """Report errors that a user can fix, and stop requests, in one sentence; other errors pass with their traceback.

    With --verbose every error has its traceback. Until the command handles signals itself, a signal ends it at once.
    """
    try:
        with exit_on_signal():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:
        from kdpipe.pipeline.terminal.exit_codes import exit_code

        if _is_unread(error):  # end without a word, as other tools do
            raise typer.Exit(exit_code(error)) from None
        sentence = _sentence(error)
        if sentence is None:
            raise
        if verbosity() == Verbosity.VERBOSE:
            import traceback

            print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)  # noqa: T201
        print_line(sentence)
        raise typer.Exit(exit_code(error)) from None


def _is_unread(error: BaseException) -> bool:
    """Return whether the reader of stdout has closed it, as in `kdpipe report RUN | head`."""
    if isinstance(error, SystemExit):  # rich exits this way
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and error.filename == STDOUT


def _os_sentence(error: OSError) -> str:
    where, shared_memory = f": {error.filename}" if error.filename else "", _shared_memory_advice(error)
    if error.errno in DISK_ERRORS and where and error.filename != STDOUT and not shared_memory:
        what, advice = explain(error)
        return f"error: {what}{where}; {advice}, and run the same command again."
    return f"error: {error.strerror or error}{where}.{shared_memory}"


def _shared_memory_advice(error: BaseException) -> str:
    """Return what to do if shared memory, through which image-loading processes pass tensors, is full; else nothing."""
    text = f"{error} {getattr(error, 'filename', None)}"
    is_full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.ENOMEM)
    if not is_full or ("/dev/shm" not in text and "shared memory" not in text):
        return ""
    return (
        " The shared memory /dev/shm is too small: give the container more (docker run --shm-size=1g), or load images "
        "in this process (data.num_workers = 0)."
    )


def _sentence(error: BaseException) -> str | None:  # noqa: PLR0911
    """Return what to tell the user; None for an error that is a bug."""
    from kdpipe.stages.errors import StoppedEarly
    from kdpipe.stages.runtime.memory import is_out_of_memory
    from kdpipe.store import KdpipeError

    match error:
        case StoppedEarly():
            return f"stopped early {error}{AGAIN}"
        case KeyboardInterrupt():
            return "interrupted; the last checkpoint, if any, is kept."
        case KdpipeError():
            return f"error: {error}"
        case SystemExit():  # not ours: a status of 0 would count as a finished job
            return f"error: user code or another package called sys.exit({error.code!r}); the command did not finish."
        case OSError():
            return _os_sentence(error)
    if "DataLoader worker (pid" in str(error):  # raised by torch's handler of SIGCHLD
        return (
            "error: an image-loading process ended unexpectedly: killed, perhaps for lack of memory (lower "
            "data.num_workers or the batch size), or by a custom transform. Run the same command again."
        )
    if isinstance(error, RuntimeError) and (advice := _shared_memory_advice(error)):
        return f"error: {str(error).partition(chr(10))[0]}.{advice}"
    if is_out_of_memory(error):
        first_line = str(error).strip().partition("\n")[0]
        return f"error: out of memory ({first_line}): lower the batch sizes or the widths of the networks."
    return None
