"""Run a command on a recipe: under signals, clock and lock, with progress and a record in the run folder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kdpipe.pipeline.session.guard import guarded
from kdpipe.pipeline.session.options import CommonOptions, JobOptions
from kdpipe.pipeline.session.signals import handle_signals
from kdpipe.pipeline.terminal.output import print_debug, print_info, print_json, print_warning
from kdpipe.store.redact import redacted, redacted_options

if TYPE_CHECKING:
    from kdpipe.pipeline.recipe.load import Recipe
    from kdpipe.pipeline.run import Run
    from kdpipe.pipeline.terminal.whole_run import WholeRun
    from kdpipe.stages.compress.compress import Step
    from kdpipe.stages.runtime.distributed import ProcessGroup
    from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
    from kdpipe.stages.runtime.launcher import WorkShard
    from kdpipe.stages.workspace import Workspace

DISTRIBUTED = ("train-teacher", "train-student", "compare", "sweep", "cohort")
"""Commands whose processes train on shares of one batch."""


def _say_at_once(recipe: Path, options: CommonOptions) -> None:
    """Print a first line on a terminal: loading torch takes seconds."""
    if not options.as_json and sys.stderr is not None and sys.stderr.isatty():
        print_info(f"reads {recipe} ...")


def _load(recipe: Path, options: CommonOptions, *, sweeps: bool = False) -> tuple[Recipe, Path]:
    """Return the resolved recipe and its run folder; if it `sweeps`, --set may give a key several values."""
    from kdpipe.pipeline.recipe.load import load_recipe
    from kdpipe.pipeline.recipe.sweep import sweep_overrides

    overrides = options.set_ or []
    loaded = load_recipe(recipe, sweep_overrides(overrides) if sweeps else overrides, os.environ)
    return loaded, options.run or Path("runs") / loaded.name


def _workspace(folder: Path, options: CommonOptions) -> Workspace:
    from kdpipe.stages.workspace import workspace_of

    return workspace_of(folder, None if options.workspace is None else str(options.workspace))


@contextmanager
def open_run(recipe: Path, options: CommonOptions, *, keeps_images: bool = True, sweeps: bool = False) -> Iterator[Run]:
    """Yield the run of a recipe for work that only reads its run folder: with signals and progress, without a lock."""
    with handle_signals(options.max_duration) as should_stop:
        _say_at_once(recipe, options)
        from kdpipe.pipeline.run import Run
        from kdpipe.pipeline.terminal.progress import reporter
        from kdpipe.stages.runtime.events import RunMonitor

        loaded, folder = _load(recipe, options, sweeps=sweeps)
        workspace = _workspace(folder, options)
        with reporter(options.as_json) as report:
            run = Run(
                loaded,
                folder,
                RunMonitor(report, should_stop),
                share=options.share,
                workspace=workspace,
                keeps_images=keeps_images,
            )
            run.set_up_machine()
            yield run


def run_job(
    command: str,
    recipe: Path,
    options: JobOptions,
    *,
    part: str | None = None,
    count: int = 1,
    only: Step | None = None,
) -> None:
    """Run a command under signals, lock and progress, then print its results to stdout.

    Args:
        command: Name of the command.
        recipe: Path of the recipe.
        options: Options of the command line.
        part: Part of the units to compute, as "I/N", in `cache-teacher`.
        count: Number of generations, in `generations`.
        only: The single step to do, in `compress`.
    """
    # Signals first: a job stopped while torch loads must exit with 75 too.
    with guarded(), handle_signals(options.max_duration) as should_stop, ExitStack() as advice:
        _say_at_once(recipe, options)
        from kdpipe.pipeline.run import Run
        from kdpipe.stages.runtime.gpu.device import select_device
        from kdpipe.store import exclusive, shared

        loaded, folder = _load(recipe, options, sweeps=command == "sweep")
        workspace = _workspace(folder, options)
        advice.enter_context(_new_run_advised(command, recipe, options, folder))
        advice.enter_context(_nothing_left_of_a_failure(folder))
        monitor = _monitor(loaded, folder, options, should_stop)
        work, work_shard = _work(command, count, only), _work_shard(part) if command == "cache-teacher" else None
        # Before the processes join: a group that uses GPUs asks CUDA for the devices, which works only once.
        fraction = loaded.gpu_memory_fraction
        select_device(loaded.device, share=options.share, memory_fraction=fraction, warn=print_warning)
        # Several jobs may fill one store, or train many students, in one run folder; others have it to themselves.
        lock = shared if command in ("cache-teacher", "compare", "sweep", "search") else exclusive
        with _process_group(command, should_stop) as process_group, ExitStack() as locks:
            process_group.on_main(lambda: _lock(locks, lock(folder, folder / ".kdpipe.lock")))
            run = Run(
                loaded,
                folder,
                monitor,
                work_shard or process_group.work_shard,
                share=options.share,
                process_group=process_group,
                workspace=workspace,
            )
            run.begin()
            if process_group.is_main:
                _tidy(folder, is_alone=lock is exclusive)
            with _recorded(run, command) as run:
                with _with_progress(run, command, options) as shown:
                    process_group.check_stop(shown.monitor)
                    # What callbacks and trackers print is not part of the results.
                    with shown.phase(command), redirect_stdout(sys.stderr):
                        results = work(shown)
                    shown.write_recipe()
                if process_group.is_main and (code := _print_results(command, run, results, options.as_json)):
                    raise typer.Exit(code)


@contextmanager
def _new_run_advised(command: str, recipe: Path, options: JobOptions, folder: Path) -> Iterator[None]:
    """Give the advice to choose another run folder as a command to paste: what fits is used there again."""
    from kdpipe.stages.errors import ANOTHER_RUN
    from kdpipe.store import FingerprintMismatch

    try:
        yield
    except FingerprintMismatch as error:
        new = next(path for n in count(2) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
        own = command in ("compare", "generations", "cohort", "search")
        words = ["kdpipe", command if own else "run", str(recipe)]
        kept = [change for change in options.set_ or () if not change.startswith("cache.store=")]
        words += [word for change in kept for word in ("--set", redacted_options(change))] + ["--run", str(new)]
        words += ["--workspace", str(options.workspace)] if options.workspace else []
        advised = f"a new run, which uses all that fits of this one (`{shlex.join(words)}`)"
        error.args = (redacted(str(error).replace(ANOTHER_RUN, advised)),)
        raise


@contextmanager
def _nothing_left_of_a_failure(folder: Path) -> Iterator[None]:
    """Remove the run folder that this command made if it fails before it made anything else."""
    from kdpipe.store import KdpipeError, LockedError, exclusive
    from kdpipe.store.fs.checksums import SUMS

    is_new = not folder.exists()
    records = {"recipe.json", "run.json", "events.jsonl", SUMS, ".run.json.lock", ".kdpipe.lock"}
    try:
        yield
    except KdpipeError:
        with suppress(OSError, LockedError):
            if is_new and {path.name for path in folder.iterdir()} <= records:
                with exclusive(folder, folder / ".kdpipe.lock"):
                    for name in records - {".kdpipe.lock"}:
                        (folder / name).unlink(missing_ok=True)
                (folder / ".kdpipe.lock").unlink(missing_ok=True)
                folder.rmdir()
        raise


def _tidy(folder: Path, *, is_alone: bool) -> None:
    """Remove what killed jobs left in a run folder, and warn of jobs that cannot be checked."""
    from kdpipe.stages.training.job_dir import note_on_old_jobs, sweep_run

    if is_alone:
        sweep_run(folder)
    if note := note_on_old_jobs(folder):
        print_warning(note)


def _monitor(recipe: Recipe, folder: Path, options: JobOptions, should_stop: Callable[[], bool]) -> RunMonitor:
    """Return a monitor with the stop flag, and with the callbacks of the recipe and of --tensorboard."""
    from kdpipe.pipeline.callbacks.registry import build_callbacks
    from kdpipe.pipeline.recipe.load import recipe_json
    from kdpipe.stages.runtime.events import RunMonitor

    named = [entry if isinstance(entry, str) else entry["name"] for entry in recipe.callbacks]
    more = ["tensorboard"] if options.tensorboard and "tensorboard" not in named else []
    callbacks = build_callbacks([*recipe.callbacks, *more])
    return RunMonitor(should_stop=should_stop, callbacks=callbacks, config=recipe_json(recipe), run_dir=folder)


@contextmanager
def _recorded(run: Run, command: str) -> Iterator[Run]:
    """Yield the run with an event log and a session record in its folder."""
    from kdpipe.pipeline.recipe.load import recipe_json
    from kdpipe.pipeline.session.event_log import event_log
    from kdpipe.pipeline.session.run_record import fingerprints, session

    rank = run.process_group.rank if run.process_group.count > 1 else None
    with event_log(run.folder, command, rank=rank) as log:
        logged = replace(run, monitor=replace(run.monitor, report=log))
        if not run.process_group.is_main:
            yield logged
            return
        with session(run.folder, command, recipe_json(run.recipe), argv=sys.argv[1:]) as record:
            record.note(device=str(run.device))
            try:
                yield replace(logged, phase=record.phase)
            finally:
                record.note(fingerprints=fingerprints(run))


@contextmanager
def _with_progress(run: Run, command: str, options: JobOptions) -> Iterator[Run]:
    """Yield the run with progress on stderr."""
    from kdpipe.pipeline.terminal.progress import reporter
    from kdpipe.pipeline.terminal.reporter import to_all

    if not run.process_group.is_main:
        yield replace(run, monitor=replace(run.monitor, report=to_all(_print_data_warning, run.monitor.report)))
        return
    with reporter(options.as_json, _whole_run(run.recipe, command)) as show:
        yield replace(run, monitor=replace(run.monitor, report=to_all(show, run.monitor.report)))


def _whole_run(recipe: Recipe, command: str) -> WholeRun | None:
    """Return the jobs that a command does, for its progress; None of a command that does a single one, or others."""
    from kdpipe.pipeline.recipe.planned_jobs import planned_jobs
    from kdpipe.pipeline.run_stages import STAGES
    from kdpipe.pipeline.terminal.whole_run import WholeRun

    stages = list(STAGES) if command == "run" else [command] if command in STAGES else []
    jobs = planned_jobs(recipe, stages)
    return WholeRun(jobs) if len(jobs) > 1 else None


@contextmanager
def _process_group(command: str, should_stop: Callable[[], bool]) -> Iterator[ProcessGroup]:
    """Yield the processes that a launcher started for this command.

    In `cache-teacher` each computes its own part of the store; commands for one process refuse several.
    """
    from kdpipe.stages.runtime.distributed import SINGLE, init_distributed, require_single_process

    if command in DISTRIBUTED:
        with init_distributed(os.environ, should_stop) as process_group:
            yield process_group
        return
    if command != "cache-teacher":
        require_single_process(os.environ, f"kdpipe {command}")
    yield SINGLE


def _lock(locks: ExitStack, context: Any) -> None:
    locks.enter_context(context)


def _print_data_warning(event: ProgressEvent) -> None:
    """Print the warnings about images that only this process, not the first, sees."""
    from kdpipe.stages.runtime.events import WARNING

    if event.unit == WARNING and event.stage == "data":
        print_warning(event.job)


def _work(command: str, count: int, only: Step | None) -> Callable[[Run], dict[str, Any]]:
    from kdpipe.pipeline.commands.cohort import run_cohort
    from kdpipe.pipeline.commands.generations import run_generations
    from kdpipe.pipeline.commands.search.search import run_search
    from kdpipe.pipeline.commands.variants.compare import run_compare
    from kdpipe.pipeline.commands.variants.sweep import run_sweep
    from kdpipe.pipeline.run_stages import STAGES, run_all, run_compress

    functions: dict[str, Callable[[Run], dict[str, Any]]] = {
        **STAGES,
        "run": run_all,
        "compress": partial(run_compress, only=only),
        "compare": run_compare,
        "sweep": run_sweep,
        "cohort": run_cohort,
        "search": run_search,
        "generations": partial(run_generations, count=count),
    }
    return functions[command]


def _write_page(folder: Path) -> Path | None:
    """Write the page of a run and return its path; None, with a warning, if that fails: the results are there."""
    from kdpipe.pipeline.report.html.write import write_page
    from kdpipe.store import KdpipeError

    path = folder / "report.html"
    try:
        write_page([folder], path, print_debug)
    except (KdpipeError, OSError) as error:
        print_warning(f"the page was not written: {error}")
        return None
    return path


def _print_results(command: str, run: Run, results: dict[str, Any], as_json: bool) -> int:
    """Print the results to stdout, and write the page of a whole run; return the exit status."""
    from kdpipe.pipeline.commands.cohort import print_cohort
    from kdpipe.pipeline.commands.generations import print_generations
    from kdpipe.pipeline.commands.search.search import print_search
    from kdpipe.pipeline.commands.summary import print_summary
    from kdpipe.pipeline.commands.variants.compare import print_compare
    from kdpipe.pipeline.commands.variants.sweep import print_sweep
    from kdpipe.pipeline.report.pareto import write_pareto_plot
    from kdpipe.pipeline.report.printing import print_reports
    from kdpipe.pipeline.terminal.exit_codes import DONE

    if command in ("run", "compress"):
        write_pareto_plot(run.folder)
    if command == "run":
        return print_reports([run.folder], as_json, page=None if as_json else _write_page(run.folder))
    if as_json:
        print_json({"command": command, "run": str(run.folder), **results})
    elif command == "compare":
        print_compare(run.recipe.name, run.folder, results)
    elif command == "sweep":
        print_sweep(run.recipe.name, run.folder, results)
    elif command == "cohort":
        print_cohort(run.recipe.name, run.folder, results)
    elif command == "search":
        print_search(run.recipe.name, run.folder, results)
    elif command == "generations":
        print_generations(run.recipe.name, results)
    else:
        print_summary(command, run.folder, results)
    return DONE


def _work_shard(text: str | None) -> WorkShard:
    from kdpipe.stages.runtime.launcher import parse_shard, shard_from_env

    return parse_shard(text) if text is not None else shard_from_env(os.environ)
