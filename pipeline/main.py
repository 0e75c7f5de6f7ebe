"""The command line: one command a stage, `run` for all of them, `demo` for a first look, `report` and `store info`.

Nothing heavy is imported here before a command runs: `kdpipe --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.command import AsJson, Overrides, RecipePath, RunFolder, guarded, print_json, say, walking
from pipeline.store_app import store_app

if TYPE_CHECKING:
    from pipeline.walk import Walk
    from stages.compress import Step
    from stages.part import Part

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
app.add_typer(store_app, name="store")

PartOf = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Compute only part I of N of the units, counted from 0 [default: as torchrun or Slurm say, else all].",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; neither run the teacher nor write.")]


@app.command()
def demo(run: RunFolder = None, as_json: AsJson = False) -> None:
    """The whole road on real digits, in two minutes. No download; ends with the tables."""
    _execute("run", _builtin_recipe("digits.toml"), None, run, as_json)


@app.command()
def train_teacher(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Train the teacher, or take given weights. The recipe says which."""
    _execute("train-teacher", recipe, set_, run, as_json)


@app.command()
def cache_teacher(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    part: PartOf = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Stage 1: keep what the teacher says. Its logits and feature maps, for every view, go into a target store."""
    if dry_run:
        _plan(recipe, set_, run, as_json, with_probe=False)
    else:
        _execute("cache-teacher", recipe, set_, run, as_json, part=part)


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """What cache-teacher would take. Units, bytes, free disk, and from a short probe the time. Writes nothing."""
    _plan(recipe, set_, run, as_json, with_probe=True)


@app.command()
def views(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    save: Annotated[Path, typer.Option("--save", metavar="FILE", help="Where the picture goes.")] = Path("views.png"),
    num_samples: Annotated[int, typer.Option("--samples", min=1, max=100)] = 8,
    num_views: Annotated[int, typer.Option("--views", min=1, max=100)] = 6,
    as_json: AsJson = False,
) -> None:
    """Draw samples x views as a PNG. The store's top-3 under each, so that people can look. Writes nothing else."""
    with guarded(), walking(recipe, set_, run, as_json) as walk:
        from pipeline.view_grid import draw_grid
        from pipeline.walk import walk_views

        shown, store = walk_views(walk, num_samples, num_views)
        draw_grid(shown, save)
    if store is None:
        say("there is no finished store yet, so the pictures stand without the teacher's words.")
    if as_json:
        samples = zip(shown.sample_ids, shown.labels, shown.top, shown.partners, strict=True)
        print_json(
            {
                "command": "views",
                "picture": str(save),
                "store": store,
                "samples": [dict(zip(("id", "label", "top", "partners"), sample, strict=True)) for sample in samples],
            }
        )
    else:
        typer.echo(f"{save}: {shown.images.shape[0]} samples in {shown.images.shape[1]} views")


@app.command()
def train_student(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """Stage 2: students alone and distilled. One of each for every seed, the teacher never loaded."""
    _execute("train-student", recipe, set_, run, as_json)


@app.command()
def compress(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    only: Annotated[
        Literal["prune", "quantize", "export"] | None, typer.Option("--only", help="Do this part of it alone.")
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Compress a student trained elsewhere: a .safetensors file, or a torch state dict.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stage 3: prune, quantize, export. The store teaches the distilled student all the while."""
    overrides = list(set_ or ())
    if given is not None:
        overrides.append(f"compress.student={json.dumps(str(given.absolute()), ensure_ascii=False)}")
    _execute("compress", recipe, overrides, run, as_json, only=only)


@app.command()
def sensitivity(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    num_batches: Annotated[int, typer.Option("--batches", min=1, max=1000, help="Batches of views to look at.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Which layers suffer from INT8. One layer float at a time, and one in INT8 alone; writes nothing."""
    with guarded(), walking(recipe, set_, run, as_json) as walk:
        from pipeline.sensitivity import print_sensitivity
        from pipeline.walk import walk_sensitivity

        network, layers = walk_sensitivity(walk, num_batches)
        if as_json:
            print_json({"command": "sensitivity", "network": network, "layers": [asdict(layer) for layer in layers]})
        else:
            print_sensitivity(network, layers)


@app.command("run")
def run_all(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """All stages, skipping what is done. Ends with the table."""
    _execute("run", recipe, set_, run, as_json)


@app.command()
def compare(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None, as_json: AsJson = False) -> None:
    """The same student, taught in each way that the recipe names. Over its seeds; ends with accuracies and costs."""
    _execute("compare", recipe, set_, run, as_json)


@app.command()
def generations(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    count: Annotated[int, typer.Option("--count", min=1, max=100, help="How many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Born-again networks: the student becomes the teacher. Cached anew each time; ends with all accuracies."""
    _execute("generations", recipe, set_, run, as_json, count=count)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER")], as_json: AsJson = False) -> None:
    """Print the table of a run again."""
    with guarded():
        _print_report(run, as_json)


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(metavar="LOSS", help="One loss, with all its keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the losses. What each minimises, its paper and keys, and what it needs stored of the teacher."""
    with guarded():
        from pipeline.losses import print_loss, print_losses
        from stages.list_losses import find_loss, list_losses

        listed = list_losses() if name is None else [find_loss(name)]
        if as_json:
            print_json({"command": "losses", "losses": [loss.to_json() for loss in listed]})
        elif name is None:
            print_losses(listed)
        else:
            print_loss(listed[0])


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.onnx", help="Others are held against the first.")],
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", metavar="N", min=1, max=65536, help="May be repeated [default: 1, 64]."),
    ] = None,
    *,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, max=1024, help="[default: all cores]")] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=3, help="How often each file is timed.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of ONNX files on this CPU. In onnxruntime, in turn in one process; writes nothing."""
    with guarded():
        from pipeline.bench import print_bench, run_bench

        measured = run_bench(models, batch_size or (), num_threads=threads, num_rounds=rounds, as_json=as_json)
        if as_json:
            print_json(measured.to_json())
        else:
            print_bench(measured)


def _plan(recipe: Path, overrides: list[str] | None, run: Path | None, as_json: bool, *, with_probe: bool) -> None:
    """Print what `cache-teacher` would do; exit as it would where the disk is too small."""
    with guarded():
        from pipeline.plan import print_plan
        from pipeline.recipe import load_recipe
        from pipeline.walk import Walk, walk_plan
        from stages.store_plan import require_room
        from stages.watch import Watch

        sys.path.append(str(Path.cwd()))
        loaded = load_recipe(recipe, overrides or ())
        walk = Walk(loaded, run or Path("runs") / loaded.name, Watch())
        walk.take_machine()
        planned = walk_plan(walk, with_probe)
        if as_json:
            print_json({"command": "plan", **planned})
        else:
            print_plan(planned)
        require_room(walk.store, planned["missing_bytes"])


def _execute(
    command: str,
    recipe: Path,
    overrides: list[str] | None,
    run: Path | None,
    as_json: bool,
    *,
    part: str | None = None,
    count: int = 1,
    only: Step | None = None,
) -> None:
    """Do what a command stands for, under signals, lock and progress; then say on stdout what came of it."""
    from pipeline.stop_signals import stop_on_signals

    # Signals first: a job that is stopped while torch loads is stopped early like any other.
    with guarded(), stop_on_signals() as should_stop:
        from pipeline.progress import reporter
        from pipeline.recipe import load_recipe
        from pipeline.report_compressed import draw_trade
        from pipeline.walk import Walk
        from stages.part import WHOLE
        from stages.watch import Watch
        from store import exclusive, shared

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        loaded = load_recipe(recipe, overrides or ())
        folder = run or Path("runs") / loaded.name
        work = _work(command, count, only)
        # Several jobs may fill one store from one run folder; all else has the folder to itself.
        hold = shared if command == "cache-teacher" else exclusive
        with hold(folder, folder / ".kdpipe.lock"), reporter(as_json) as report_event:
            walk = Walk(loaded, folder, Watch(report_event, should_stop), _part(part) if hold is shared else WHOLE)
            walk.begin()
            walk.watch.check()
            results = work(walk)
            walk.keep_recipe()
            if command in ("run", "compress"):
                draw_trade(folder)
        if command == "run":
            _print_report(folder, as_json)
        elif as_json:
            print_json({"command": command, "run": str(folder), **results})
        else:
            _print_results(command, loaded.name, folder, results)


def _work(command: str, count: int, only: Step | None) -> Callable[[Walk], dict[str, Any]]:
    from pipeline.compare import walk_compare
    from pipeline.generations import walk_generations
    from pipeline.walk import STAGES, walk_all, walk_compress

    whole: dict[str, Callable[[Walk], dict[str, Any]]] = {
        "run": walk_all,
        "compress": partial(walk_compress, only=only),
        "compare": walk_compare,
        "generations": partial(walk_generations, count=count),
    }
    return whole[command] if command in whole else STAGES[command]


def _print_results(command: str, name: str, run: Path, results: dict[str, Any]) -> None:
    from pipeline.compare import print_compare
    from pipeline.generations import print_generations
    from pipeline.summary import print_summary

    if command == "compare":
        print_compare(name, results)
    elif command == "generations":
        print_generations(name, results)
    else:
        print_summary(command, run, results)


def _part(text: str | None) -> Part:
    from stages.part import parse_part, part_from_environment

    return parse_part(text) if text is not None else part_from_environment(os.environ)


def _print_report(run: Path, as_json: bool) -> None:
    from pipeline.exit_codes import DONE_IN_PART
    from pipeline.report import print_report, read_report

    made = read_report(run)
    if as_json:
        print_json(made.to_json())
    else:
        print_report(made)
    if made.missing:
        raise typer.Exit(DONE_IN_PART)


def _builtin_recipe(name: str) -> Path:
    """A recipe that comes with kdpipe: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "recipes" / name, here.parent / "recipes" / name) if path.exists())


def main() -> None:
    """The console script."""
    # Waiting threads sleep instead of spinning: on a box that others use too, spinning costs everybody most.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would send what it does to its makers
    app()
