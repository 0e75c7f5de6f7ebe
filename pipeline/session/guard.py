"""Turn errors of a command into one sentence on stderr and an exit status. Imports nothing heavy unless one occurs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from click import ClickException, Context
from typer.core import TyperGroup

from kdpipe.pipeline.session.signals import exit_on_signal
from kdpipe.pipeline.terminal.output import Verbosity, print_line, verbosity
from kdpipe.store.redact import redacted


class RedactingGroup(TyperGroup):
    """A group of commands whose usage errors, which quote the command line, lose the secrets of URLs."""

    def invoke(self, ctx: Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClickException as error:
            error.message = redacted(error.message)
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

        sentence = _sentence(error)
        if sentence is None:
            raise
        if verbosity() == Verbosity.VERBOSE:
            import traceback

            print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)  # noqa: T201
        print_line(sentence)
        raise typer.Exit(exit_code(error)) from None


def _sentence(error: BaseException) -> str | None:  # noqa: PLR0911
    """Return what to tell the user; None for an error that is a bug."""
    from kdpipe.stages.errors import StoppedEarly
    from kdpipe.stages.runtime.memory import is_out_of_memory
    from kdpipe.store import KdpipeError

    match error:
        case StoppedEarly():
            return f"stopped early {error}; all finished work is saved. Run the same command again to continue."
        case KeyboardInterrupt():
            return "interrupted; the last checkpoint, if any, is kept."
        case KdpipeError():
            return f"error: {error}"
        case SystemExit() if isinstance(error.__context__, BrokenPipeError):  # rich exits this way
            return "error: Broken pipe: standard output."
        case SystemExit():  # not ours: a status of 0 would count as a finished job
            return f"error: user code or another package called sys.exit({error.code!r}); the command did not finish."
        case OSError():
            return f"error: {error.strerror or error}: {error.filename or 'standard output'}."
    if "DataLoader worker (pid" in str(error):  # raised by torch's handler of SIGCHLD
        return (
            "error: an image-loading process ended unexpectedly: killed, perhaps for lack of memory (lower "
            "data.num_workers or the batch size), or by a custom transform. Run the same command again."
        )
    if is_out_of_memory(error):
        first_line = str(error).strip().partition("\n")[0]
        return f"error: out of memory ({first_line}): lower the batch sizes or the widths of the networks."
    return None
