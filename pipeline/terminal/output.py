"""How every command answers: one sentence for a mistake, one document for a machine. Nothing heavy is imported here
before something went wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from pipeline.session.signals import stop_at_once

MOST_LETTERS = 2000
"""Of a sentence; a path has 4096 at most, and seldom more than 200."""


@contextmanager
def guarded() -> Iterator[None]:
    """Turn what a user can mend, and being asked to stop, into one sentence on stderr and an exit status."""
    try:
        with stop_at_once():  # until the command has something to save, and hears of signals otherwise
            yield
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:
        from pipeline.terminal.exit_codes import exit_code
        from stages.errors import StoppedEarly
        from stages.machine.memory import is_out_of_memory
        from store import KdpipeError

        if isinstance(error, StoppedEarly):
            say(f"stopped early {error}; everything done is saved. Run the same command again to go on.")
        elif isinstance(error, KeyboardInterrupt):
            say("interrupted; the last checkpoint, if there is one, stands.")
        elif isinstance(error, KdpipeError):
            say(f"error: {error}")
        elif isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # rich ends so
            say("error: Broken pipe: standard output.")
            raise typer.Exit(1) from None
        elif isinstance(error, SystemExit):  # no code of ours: a 0 of it would read as a job that is done
            say(f"error: code of your own, or of another package, called sys.exit({error.code!r}): nothing is done.")
        elif isinstance(error, OSError):
            say(f"error: {error.strerror or error}: {error.filename or 'standard output'}.")
        elif "DataLoader worker (pid" in str(error):  # torch's own sentence, from its handler of SIGCHLD
            say(
                "error: a process that renders images ended before its time: killed, perhaps for want of memory (lower "
                "data.num_workers or the batch size), or by a transform of your own. Run the same command again."
            )
        elif is_out_of_memory(error):
            first_line = str(error).strip().partition("\n")[0]
            say(f"error: out of memory ({first_line}): lower batch sizes, or the networks' widths.")
        else:
            raise
        raise typer.Exit(exit_code(error)) from None


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document))  # noqa: T201


def printable(text: str) -> str:
    """`text` as a terminal may be shown it: file names and manifests of strangers may hold control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def say(sentence: str) -> None:
    """One sentence for people, on stderr; where that is closed or full, nobody is told, and nothing ends of it."""
    if sys.stderr is not None:  # else print would take stdout for it
        with suppress(OSError, ValueError):
            print(f"kdpipe: {printable(shortened(sentence))}", file=sys.stderr, flush=True)  # noqa: T201


def shortened(sentence: str) -> str:
    """`sentence`, and where that is longer than anybody reads, without the middle of its longest words: a name of
    100,000 letters must not take from sight what is wrong with it.
    """
    if len(sentence) <= MOST_LETTERS:
        return sentence
    words = (word if len(word) <= 200 else f"{word[:100]}...{word[-90:]}" for word in sentence.split(" "))
    return " ".join(words)[: 2 * MOST_LETTERS]
