"""The command line: one command a stage, `run` for all of them, `demo` for a first look, and what looks at what they
left. Nothing heavy is imported here before a command runs: `kdpipe --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.job import run_job, walking
from pipeline.recipe_app import recipe_app
from pipeline.session.options import AsJson, Asked, AskedJob, RecipePath, with_options
from pipeline.session.paths import named, require_file, require_place
from pipeline.store_app import store_app
from pipeline.terminal.output import guarded, print_json, printable, say

EXIT_CODES = (
    "Exit status: 0 done; 1 failed; 2 usage or recipe; 3 done in part; 11 locked by another job; "
    "12 fingerprint mismatch; 75 stopped early, run the same command again; 130 broken off by a second Ctrl-C."
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
app.add_typer(recipe_app, name="recipe")
app.add_typer(store_app, name="store")


def _a_part(text: str | None) -> str | None:
    """What --part is given, if it can be one: before the run folder is touched."""
    if text is not None:
        from stages.errors import RecipeError
        from stages.part import parse_part

        try:
            parse_part(text[:40])
        except RecipeError as error:
            raise typer.BadParameter(str(error)) from None
    return text


PartOf = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        callback=_a_part,
        help="Compute only part I of N of the units, counted from 0 [default: as torchrun or Slurm say, else all].",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; neither run the teacher nor write.")]


@app.command()
@with_options
def demo(asked: AskedJob) -> None:
    """The whole road on real digits, in two minutes. No download; ends with the tables."""
    run_job("run", _builtin_recipe("digits.toml"), asked)


@app.command()
@with_options
def train_teacher(recipe: RecipePath, asked: AskedJob) -> None:
    """Train the teacher, or take given weights. The recipe says which."""
    run_job("train-teacher", recipe, asked)


@app.command()
@with_options
def cache_teacher(recipe: RecipePath, asked: AskedJob, *, part: PartOf = None, dry_run: DryRun = False) -> None:
    """Stage 1: keep what the teacher says. Its logits and feature maps, for every view, go into a target store."""
    if dry_run:
        _plan(recipe, asked, with_probe=False)
    else:
        run_job("cache-teacher", recipe, asked, part=part)


@app.command()
@with_options
def plan(recipe: RecipePath, asked: Asked) -> None:
    """What cache-teacher would take. Units, bytes, free disk, and from a short probe the time. Writes nothing."""
    _plan(recipe, asked, with_probe=True)


@app.command()
@with_options
def views(
    recipe: RecipePath,
    asked: Asked,
    *,
    save: Annotated[Path, typer.Option("--save", metavar="FILE", parser=named, help="Where the picture goes.")] = Path(
        "views.png"
    ),
    num_samples: Annotated[int, typer.Option("--samples", min=1, max=100)] = 8,
    num_views: Annotated[int, typer.Option("--views", min=1, max=100)] = 6,
) -> None:
    """Draw samples x views as a PNG. The store's top-3 under each, so that people can look. Writes nothing else."""
    with guarded():
        require_place(save, "--save", ".png")
    with guarded(), walking(recipe, asked) as walk:
        from pipeline.commands.view_grid import draw_grid
        from pipeline.run import walk_views

        shown, store = walk_views(walk, num_samples, num_views)
        draw_grid(shown, save)
    if store is None:
        say("there is no finished store yet, so the pictures stand without the teacher's words.")
    if asked.as_json:
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
        typer.echo(f"{printable(str(save))}: {shown.images.shape[0]} samples in {shown.images.shape[1]} views")


@app.command()
@with_options
def train_student(recipe: RecipePath, asked: AskedJob) -> None:
    """Stage 2: students alone and distilled. One of each for every seed, the teacher never loaded."""
    run_job("train-student", recipe, asked)


@app.command()
@with_options
def compress(
    recipe: RecipePath,
    asked: AskedJob,
    *,
    only: Annotated[
        Literal["prune", "quantize", "export"] | None, typer.Option("--only", help="Do this part of it alone.")
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            parser=named,
            help="Compress a student trained elsewhere: a .safetensors file, or a torch state dict.",
        ),
    ] = None,
) -> None:
    """Stage 3: prune, quantize, export. The store teaches the distilled student all the while."""
    if given is not None:
        with guarded():
            require_file(given, "--from", "weights file")
        override = f"compress.student={json.dumps(str(given.absolute()), ensure_ascii=False)}"
        asked = replace(asked, set_=[*(asked.set_ or ()), override])
    run_job("compress", recipe, asked, only=only)


@app.command()
@with_options
def sensitivity(
    recipe: RecipePath,
    asked: Asked,
    *,
    num_batches: Annotated[int, typer.Option("--batches", min=1, max=1000, help="Batches of views to look at.")] = 8,
) -> None:
    """Which layers suffer from INT8. One layer float at a time, and one in INT8 alone; writes nothing."""
    with guarded(), walking(recipe, asked) as walk:
        from pipeline.commands.sensitivity import print_sensitivity
        from pipeline.run import walk_sensitivity

        network, layers = walk_sensitivity(walk, num_batches)
        if asked.as_json:
            print_json({"command": "sensitivity", "network": network, "layers": [asdict(layer) for layer in layers]})
        else:
            print_sensitivity(network, layers)


@app.command("run")
@with_options
def run_all(recipe: RecipePath, asked: AskedJob) -> None:
    """All stages, skipping what is done. Ends with the table."""
    run_job("run", recipe, asked)


@app.command()
@with_options
def compare(recipe: RecipePath, asked: AskedJob) -> None:
    """The same student, taught in each way that the recipe names. Over its seeds; ends with accuracies and costs."""
    run_job("compare", recipe, asked)


@app.command()
@with_options
def generations(
    recipe: RecipePath,
    asked: AskedJob,
    *,
    count: Annotated[int, typer.Option("--count", min=1, max=100, help="How many.")] = 3,
) -> None:
    """Born-again networks: the student becomes the teacher. Cached anew each time; ends with all accuracies."""
    run_job("generations", recipe, asked, count=count)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Several are set side by side.")],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            parser=named,
            help="Where the page goes [default: report.html in the run folder].",
        ),
    ] = None,
    *,
    no_html: Annotated[bool, typer.Option("--no-html", help="Print the tables alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document; a page only with --html.")] = False,
) -> None:
    """Print the tables of runs, and write a page of them. One HTML file with diagrams, to open anywhere."""
    if html is not None and no_html:
        raise typer.BadParameter("--html and --no-html exclude each other.")
    with guarded():
        from pipeline.report.command import page_place, tell_report, write_report

        page = page_place(runs, html) if html is not None or not (no_html or as_json) else None
        code = tell_report(runs, as_json)
        if page is not None:
            write_report(runs, page)
        if code:
            raise typer.Exit(code)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Table all runs and stores below a folder. Stage, progress, rate, last sign of life, size, result."""
    with guarded():
        from pipeline.status.scan import print_status, read_status

        found = read_status(folder)
        if as_json:
            print_json(found.to_json())
        else:
            print_status(found)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs. Versions, machine, GPUs, limits; neither host nor user."""
    with guarded():
        from pipeline.commands.env import print_env, read_env

        found = read_env()
        if as_json:
            print_json({"command": "env", **found})
        else:
            print_env(found)


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(metavar="LOSS", help="One loss, with all its keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the losses. What each minimises, its paper and keys, and what it needs stored of the teacher."""
    with guarded():
        from pipeline.commands.losses import print_loss, print_losses
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
    rounds: Annotated[int, typer.Option(metavar="N", min=3, max=100_000, help="How often each file is timed.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of ONNX files on this CPU. In onnxruntime, in turn in one process; writes nothing."""
    with guarded():
        from pipeline.commands.bench import print_bench, run_bench

        measured = run_bench(models, batch_size or (), num_threads=threads, num_rounds=rounds, as_json=as_json)
        if as_json:
            print_json(measured.to_json())
        else:
            print_bench(measured)


def _plan(recipe: Path, asked: Asked, *, with_probe: bool) -> None:
    """Print what `cache-teacher` would do; exit as it would where the disk is too small."""
    with guarded(), walking(recipe, asked) as walk:
        from pipeline.commands.plan import print_plan, settings_json
        from pipeline.recipe.load import load_recipe_with_origins
        from pipeline.run import walk_plan
        from stages.store_plan import require_room

        _, settings = load_recipe_with_origins(recipe, asked.set_ or (), os.environ)
        planned = walk_plan(walk, with_probe)
        if asked.as_json:
            print_json({"command": "plan", **planned, "settings": settings_json(settings)})
        else:
            print_plan(planned, settings)
        require_room(walk.store, planned["missing_bytes"])


def _builtin_recipe(name: str) -> Path:
    """A recipe that comes with kdpipe: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "recipes" / name, here.parent / "recipes" / name) if path.exists())


def main() -> None:
    """The console script."""
    # Waiting threads sleep instead of spinning: on a box that others use too, spinning costs everybody most.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would send what it does to its makers
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them is a tenth of a short command
    try:
        app()
    except OSError as error:  # of a help text, which nothing guards: a full disk, a pipe that nobody reads
        say(f"error: {error.strerror or error}: {error.filename or 'standard output'}.")
        sys.exit(1)
