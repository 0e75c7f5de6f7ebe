"""Define the command line of kdpipe. Heavy imports happen inside commands, so that `kdpipe --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdpipe.pipeline.job import open_run, run_job
from kdpipe.pipeline.recipe_app import recipe_app
from kdpipe.pipeline.runs_app import clean, report, status, verify
from kdpipe.pipeline.session.guard import RedactingGroup, guarded
from kdpipe.pipeline.session.options import AsJson, CommonOptions, JobOptions, Quiet, RecipePath, Verbose, with_options
from kdpipe.pipeline.session.paths import output_path, require_file, require_writable
from kdpipe.pipeline.store_app import store_app
from kdpipe.pipeline.terminal.output import Verbosity, print_info, print_line, print_result, printable, set_verbosity
from kdpipe.pipeline.terminal.streams import STDOUT

EXIT_CODES = (
    "Exit status: 0 done; 1 failed; 2 usage or recipe; 3 done in part; 11 locked by another job; "
    "12 fingerprint mismatch; 75 stopped early, run the same command again; 130 aborted by a second Ctrl-C."
)

DEMO = (
    "all stages on the digits data set, 3 to 4 minutes on two cores, without a download: train a teacher and cache "
    "its outputs; train a small student alone, and distilled from the cache; prune and quantize the distilled one."
)

app = typer.Typer(
    name="kdpipe",
    cls=RedactingGroup,
    help="Offline knowledge distillation: cache a teacher's outputs once, train students from the cache.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_set: bool) -> None:
    if is_set:
        from kdpipe.stages.runtime.versions import NAME, commit, versions

        head, dirty = commit()
        source = f" (commit {head[:12]}{', modified' if dirty else ''})" if head else ""
        typer.echo(f"{NAME} {versions().get(NAME) or 'not installed'}{source}")
        raise typer.Exit


@app.callback()
def common(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Handle the options before the command: their callbacks have done it."""


app.add_typer(recipe_app, name="recipe")
app.add_typer(store_app, name="store")


PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Compute only part I of N of the units, counted from 0 [default: from torchrun or Slurm, else all].",
    ),
]
Baseline = Annotated[
    bool | None, typer.Option("--baseline/--no-baseline", help="Train the student alone too [default: the recipe's].")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; run no teacher, write nothing.")]


def _add_job(command: str, help_text: str) -> None:
    """Add a command that only takes a recipe and the options of a job."""

    @with_options
    def job(recipe: RecipePath, options: JobOptions) -> None:
        run_job(command, recipe, options)

    app.command(command, help=help_text)(job)


@app.command()
@with_options
def demo(options: JobOptions) -> None:
    """Run all stages on the digits data set (~3.5 minutes). No download; prints the result, and writes a page of it."""
    if not options.as_json:
        print_info(DEMO)
    run_job("run", _builtin_recipe("digits.toml"), options)


_add_job("train-teacher", "Train the teacher, or load its weights. The recipe decides.")


@app.command()
@with_options
def cache_teacher(recipe: RecipePath, options: JobOptions, *, part: PartOption = None, dry_run: DryRun = False) -> None:
    """Stage 1: cache the teacher's outputs. Stores its logits and features for every view."""
    if dry_run and part is not None:
        raise typer.BadParameter("--dry-run and --part exclude each other.")
    if dry_run:
        _plan(recipe, options, with_probe=False)
    else:
        run_job("cache-teacher", recipe, options, part=part)


@app.command()
@with_options
def plan(recipe: RecipePath, options: CommonOptions) -> None:
    """Estimate the time, disk and memory of all stages. Says what exists already; writes nothing."""
    _plan(recipe, options, with_probe=True)


@app.command()
@with_options
def views(
    recipe: RecipePath,
    options: CommonOptions,
    *,
    save: Annotated[
        Path, typer.Option("--save", metavar="FILE", parser=output_path, help="The PNG file to write.")
    ] = Path("views.png"),
    num_samples: Annotated[int, typer.Option("--samples", min=1, max=100, help="Number of rows.")] = 8,
    num_views: Annotated[int, typer.Option("--views", min=1, max=100, help="Number of columns.")] = 6,
) -> None:
    """Draw samples x views as a PNG. Shows the stored top-3 classes of the teacher under each."""
    with guarded():
        require_writable(save, "--save", ".png")
    with guarded(), open_run(recipe, options) as run:
        from kdpipe.pipeline.commands.view_grid import draw_grid, run_views

        shown, store = run_views(run, num_samples, num_views)
        draw_grid(shown, save)
    if store is None:
        print_info("there is no finished store yet, so the images are shown without the teacher's predictions.")
    names = ("id", "label", "top", "partners")
    rows = zip(shown.sample_ids, shown.labels, shown.top, shown.partners, strict=True)
    samples = [dict(zip(names, row, strict=True)) for row in rows]
    num_rows, num_columns = shown.images.shape[:2]
    print_result(
        options.as_json,
        {"command": "views", "image": str(save), "store": store, "views": shown.views, "samples": samples},
        lambda: typer.echo(f"{printable(str(save))}: {num_rows} samples in {num_columns} views"),
    )


@app.command()
@with_options
def train_student(recipe: RecipePath, options: JobOptions, *, baseline: Baseline = None) -> None:
    """Stage 2: train students alone and distilled. For every seed, from the store alone."""
    run_job("train-student", recipe, _with_baseline(options, baseline))


@app.command()
@with_options
def compress(
    recipe: RecipePath,
    options: JobOptions,
    *,
    only: Annotated[
        Literal["prune", "quantize", "export"] | None, typer.Option("--only", help="Do only this step.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            parser=output_path,
            help="Compress a student trained elsewhere: a .safetensors file, or a torch state dict.",
        ),
    ] = None,
) -> None:
    """Stage 3: prune, quantize and export the students. Distilled students are fine-tuned from the store."""
    if checkpoint is not None:
        with guarded():
            require_file(checkpoint, "--from", "weights file")
        override = f"compress.student={json.dumps(str(checkpoint.absolute()), ensure_ascii=False)}"
        options = replace(options, set_=[*(options.set_ or ()), override])
    run_job("compress", recipe, options, only=only)


@app.command()
@with_options
def sensitivity(
    recipe: RecipePath,
    options: CommonOptions,
    *,
    num_batches: Annotated[int, typer.Option("--batches", min=1, max=1000, help="Batches of views to measure on.")] = 8,
) -> None:
    """Measure how much each layer suffers from INT8. One layer float, and one layer INT8, at a time; writes nothing."""
    with guarded(), open_run(recipe, options) as run:
        from kdpipe.pipeline.commands.sensitivity import print_sensitivity, run_sensitivity

        network, layers = run_sensitivity(run, num_batches)
        document = {"command": "sensitivity", "network": network, "layers": [asdict(layer) for layer in layers]}
        print_result(options.as_json, document, lambda: print_sensitivity(network, layers))


_add_job("run", "Run all stages, skipping finished work. Prints the results.")
_add_job("compare", "Train a student with each set of losses in the recipe. Prints accuracies over seeds, and costs.")


_add_job("cohort", "Train students that teach each other. Prints each alone, in the cohort, and the ensemble.")


@app.command()
@with_options
def sweep(recipe: RecipePath, options: JobOptions, *, baseline: Baseline = None) -> None:
    """Train students with all combinations of some settings. From one store, as in --set student.train.lr=0.05,0.1."""
    run_job("sweep", recipe, _with_baseline(options, baseline))


_add_job("search", "Search the best settings of a student's training. From one store, as [search.space] says.")


@app.command()
@with_options
def generations(
    recipe: RecipePath,
    options: JobOptions,
    *,
    count: Annotated[int, typer.Option("--count", min=1, max=100, help="Number of generations.")] = 3,
) -> None:
    """Train born-again networks. Each student is the teacher of the next; prints the accuracies of all generations."""
    run_job("generations", recipe, options, count=count)


for command in (report, status, clean, verify):
    app.command()(command)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print information for bug reports. Versions, machine, GPUs and limits; no host or user names."""
    with guarded():
        from kdpipe.pipeline.commands.env import print_env, read_env

        found = read_env()
        print_result(as_json, {"command": "env", **found}, lambda: print_env(found))


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(metavar="LOSS", help="Show one loss, with all its keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the losses. Formula, paper and keys of each, and the teacher outputs that it requires."""
    with guarded():
        from kdpipe.pipeline.commands.losses import print_loss, print_losses
        from kdpipe.stages.losses.describe import find_loss, list_losses

        listed = list_losses() if name is None else [find_loss(name)]
        document = {"command": "losses", "losses": [loss.to_json() for loss in listed]}
        print_result(as_json, document, lambda: print_losses(listed) if name is None else print_loss(listed[0]))


@app.command()
@with_options
def modules(recipe: RecipePath, options: CommonOptions) -> None:
    """List the modules of teacher and student. With the shapes of their outputs; losses on features name them."""
    options = replace(options, set_=[*(options.set_ or ()), 'device="cpu"'])  # none is trained
    with guarded(), open_run(recipe, options, keeps_images=False) as run:
        from kdpipe.pipeline.commands.modules import modules_json, print_modules, run_modules

        found = run_modules(run)
        names = {"teacher": run.recipe.teacher.model.name, "student": run.recipe.student.model.name}
        document = {"command": "modules", "names": names, **modules_json(found)}
        print_result(options.as_json, document, lambda: print_modules(names, found))


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="ONNX files, IRs (.xml), programs (.pte); the first is the baseline."),
    ],
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", metavar="N", min=1, max=65536, help="Repeatable [default: 1, 64]."),
    ] = None,
    *,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, max=1024, help="[default: all cores]")] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=3, max=100_000, help="Measurements of each file.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of files on this CPU, each in its runtime, in turn in one process; writes nothing."""
    with guarded():
        from kdpipe.pipeline.commands.bench import print_bench, run_bench

        measured = run_bench(models, batch_size or (), num_threads=threads, num_rounds=rounds, as_json=as_json)
        print_result(as_json, measured, lambda: print_bench(measured))


def _with_baseline(options: JobOptions, baseline: bool | None) -> JobOptions:
    """Return the options with `student.baseline` set, if it was given."""
    if baseline is None:
        return options
    return replace(options, set_=[*(options.set_ or ()), f"student.baseline={json.dumps(baseline)}"])


def _plan(recipe: Path, options: CommonOptions, *, with_probe: bool) -> None:
    """Print what a run would do; fail if the disk is too small, as `cache-teacher` would."""
    with guarded(), open_run(recipe, options, keeps_images=False, sweeps=True) as run:
        from kdpipe.pipeline.commands.plan.plan import run_plan
        from kdpipe.pipeline.commands.plan.printing import print_plan, settings_json
        from kdpipe.pipeline.recipe.load import load_recipe_with_origins
        from kdpipe.pipeline.recipe.sweep import sweep_overrides
        from kdpipe.stages.cache_teacher.plan import require_room

        _, settings = load_recipe_with_origins(recipe, sweep_overrides(options.set_ or ()), os.environ)
        planned = run_plan(run, with_probe)
        document = {"command": "plan", **planned, "settings": settings_json(settings)}
        print_result(options.as_json, document, lambda: print_plan(planned, settings))
        require_room(Path(planned["store"]), planned["missing_bytes"])


def _builtin_recipe(name: str) -> Path:
    """Return a recipe that comes with kdpipe: inside the package if installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent  # in a checkout, kdpipe/pipeline is a link
    return next(path for path in (here / "recipes" / name, here.parent / "recipes" / name) if path.exists())


def main() -> None:
    """Run the console script `kdpipe`."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process is reported in a sentence, not in C++ frames
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # searching for them takes a tenth of a short command
    set_verbosity(Verbosity.NORMAL)
    try:
        try:
            app()
        finally:  # here, where its errors can be reported, and not when Python ends
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # while printing, which `guarded` does not cover: a full disk or a closed pipe
        if not isinstance(error, BrokenPipeError):
            print_line(f"error: {error.strerror or error}: {error.filename or STDOUT}.")
        sys.exit(1)
