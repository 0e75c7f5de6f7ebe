"""What all commands share: their common arguments, and how they answer: one sentence for a mistake, one document for
a machine. Nothing heavy is imported here before something went wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.walk import Walk

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in student.train.lr=0.05.")
]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run folder [default: runs/NAME].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress is JSON lines on stderr.")]


@contextmanager
def guarded() -> Iterator[None]:
    """Turn what a user can mend into one sentence on stderr and an exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:
        from pipeline.exit_codes import exit_code
        from stages.errors import StoppedEarly
        from store import KdpipeError

        if isinstance(error, StoppedEarly):
            say("stopped early; everything done is saved. Run the same command again to go on.")
        elif isinstance(error, KeyboardInterrupt):
            say("interrupted; the last checkpoint, if there is one, stands.")
        elif isinstance(error, KdpipeError):
            say(f"error: {error}")
        elif isinstance(error, OSError):
            say(f"error: {error.strerror or error}: {error.filename or 'standard output'}.")
        elif "DataLoader worker (pid" in str(error):  # torch's own sentence, from its handler of SIGCHLD
            say(
                "error: a process that renders images ended before its time: killed, perhaps for want of memory (lower "
                "data.num_workers or the batch size), or by a transform of your own. Run the same command again."
            )
        elif _is_out_of_memory(error):
            first_line = str(error).strip().partition("\n")[0]
            say(f"error: out of memory ({first_line}): lower batch sizes, or the networks' widths.")
        else:
            raise
        raise typer.Exit(exit_code(error)) from None


@contextmanager
def walking(recipe: Path, overrides: list[str] | None, run: Path | None, as_json: bool) -> Iterator[Walk]:
    """A recipe's walk for work that only reads its run folder: under signals and progress, without a lock."""
    from pipeline.stop_signals import stop_on_signals

    with stop_on_signals() as should_stop:
        from pipeline.progress import reporter
        from pipeline.recipe import load_recipe
        from pipeline.walk import Walk
        from stages.watch import Watch

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        loaded = load_recipe(recipe, overrides or ())
        with reporter(as_json) as report_event:
            walk = Walk(loaded, run or Path("runs") / loaded.name, Watch(report_event, should_stop))
            walk.take_machine()
            yield walk


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document))  # noqa: T201


def printable(text: str) -> str:
    """`text` as a terminal may be shown it: file names and manifests of strangers may hold control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def say(sentence: str) -> None:
    """One sentence for people, on stderr."""
    print(f"kdpipe: {printable(sentence)}", file=sys.stderr, flush=True)  # noqa: T201


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, and the CPU allocator's way of saying so."""
    texts = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
