"""The command line: one command a stage, `run` for all of them, `demo` for a first look, `report` and `store info`.

Nothing heavy is imported here before a command runs: `kdpipe --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.walk import Walk

EXIT_CODES = (
    "Exit status: 0 done; 1 failed; 2 usage or recipe; 3 done in part; 11 locked by another job; "
    "12 fingerprint mismatch; 75 stopped early, run the same command again."
)

app = typer.Typer(
    name="kdpipe",
    help="Distil knowledge offline: run the teacher once, keep what it says, train small students from the store.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(help="Look into target stores.", no_args_is_help=True)
app.add_typer(store_app, name="store")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in student.train.lr=0.05.")
]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run folder [default: runs/NAME].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress is JSON lines on stderr.")]


@app.command()
def demo(run: RunFolder = None, as_json: AsJson = False) -> None:
    """The whole road on real digits, in a minute. No download; ends with the table."""
    _execute("run", _builtin_recipe("digits.toml"), None, run, as_json)


@app.command()
def train_teacher(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Train the teacher, or take given weights. The recipe says which."""
    _execute("train-teacher", recipe, set_, run, as_json)


@app.command()
def cache_teacher(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Stage 1: keep what the teacher says. Its logits and feature maps, for every view, go into a target store."""
    _execute("cache-teacher", recipe, set_, run, as_json)


@app.command()
def train_student(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Stage 2: students alone and distilled. One of each for every seed, the teacher never loaded."""
    _execute("train-student", recipe, set_, run, as_json)


@app.command()
def compress(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Stage 3: prune, quantize, export ONNX. The store teaches the distilled student all the while."""
    _execute("compress", recipe, set_, run, as_json)


@app.command("run")
def run_all(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """All stages, skipping what is done. Ends with the table."""
    _execute("run", recipe, set_, run, as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER")], as_json: AsJson = False) -> None:
    """Print the table of a run again."""
    with _guarded():
        _print_report(run, as_json)


@store_app.command("info")
def store_info(path: Annotated[Path, typer.Argument(metavar="STORE")], as_json: AsJson = False) -> None:
    """Say what a store holds. Whose outputs, for which samples, on which views, and what is missing."""
    with _guarded():
        from pipeline.store_info import print_store_info, read_store_info

        info = read_store_info(path)
        if as_json:
            _print_json(info)
        else:
            print_store_info(info)


def _execute(command: str, recipe: Path, overrides: list[str] | None, run: Path | None, as_json: bool) -> None:
    """Walk one stage, or all of them, under signals, lock and progress; then say on stdout what came of it."""
    from pipeline.stop_signals import stop_on_signals

    # Signals first: a job that is stopped while torch loads is stopped early like any other.
    with _guarded(), stop_on_signals() as should_stop:
        from pipeline.progress import reporter
        from pipeline.recipe import load_recipe
        from pipeline.walk import STAGES, Walk, walk_all
        from stages.watch import Watch
        from store import exclusive

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        loaded = load_recipe(recipe, overrides or ())
        folder = run or Path("runs") / loaded.name
        work: Callable[[Walk], dict[str, Any]] = walk_all if command == "run" else STAGES[command]
        with exclusive(folder, folder / ".kdpipe.lock"), reporter(as_json) as report_event:
            walk = Walk(loaded, folder, Watch(report_event, should_stop))
            walk.begin()
            walk.watch.check()
            results = work(walk)
            walk.keep_recipe()
        if command == "run":
            _print_report(folder, as_json)
        elif as_json:
            _print_json({"command": command, "run": str(folder), **results})
        else:
            from pipeline.summary import print_summary

            print_summary(command, folder, results)


def _print_report(run: Path, as_json: bool) -> None:
    from pipeline.exit_codes import DONE_IN_PART
    from pipeline.report import print_report, read_report

    made = read_report(run)
    if as_json:
        _print_json(made.to_json())
    else:
        print_report(made)
    if made.missing:
        raise typer.Exit(DONE_IN_PART)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document))  # noqa: T201


def _builtin_recipe(name: str) -> Path:
    """A recipe that comes with kdpipe: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "recipes" / name, here.parent / "recipes" / name) if path.exists())


@contextmanager
def _guarded() -> Iterator[None]:
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
            _say("stopped early; everything done is saved. Run the same command again to go on.")
        elif isinstance(error, KeyboardInterrupt):
            _say("interrupted; the last checkpoint, if there is one, stands.")
        elif isinstance(error, KdpipeError):
            _say(f"error: {error}")
        elif isinstance(error, OSError):
            _say(f"error: {error.strerror or error}: {error.filename or 'standard output'}.")
        elif _is_out_of_memory(error):
            first_line = str(error).strip().partition("\n")[0]
            _say(f"error: out of memory ({first_line}): lower batch sizes, or the networks' widths.")
        else:
            raise
        raise typer.Exit(exit_code(error)) from None


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, and the CPU allocator's way of saying so."""
    texts = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _say(sentence: str) -> None:
    print(f"kdpipe: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """The console script."""
    # Waiting threads sleep instead of spinning: on a box that others use too, spinning costs everybody most.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
