"""A command under way: its recipe read, under signals, clock and lock, seen by people and kept in the run folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.session.options import Asked, AskedJob
from pipeline.session.signals import stop_when_asked
from pipeline.terminal.output import guarded, print_json, say

if TYPE_CHECKING:
    from pipeline.run import Walk
    from stages.compress import Step
    from stages.part import Part
    from stages.processes import Processes
    from stages.watch import Event

TOGETHER = ("train-teacher", "train-student", "compare")
"""The commands whose processes train on their shares of one batch."""


@contextmanager
def walking(recipe: Path, asked: Asked) -> Iterator[Walk]:
    """A recipe's walk for work that only reads its run folder: under signals and progress, without a lock."""
    with stop_when_asked(asked.max_duration) as should_stop:
        from pipeline.recipe.load import load_recipe
        from pipeline.run import Walk
        from pipeline.terminal.progress import reporter
        from stages.watch import Watch

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        loaded = load_recipe(recipe, asked.set_ or (), os.environ)
        with reporter(asked.as_json) as report_event:
            folder = asked.run or Path("runs") / loaded.name
            walk = Walk(loaded, folder, Watch(report_event, should_stop), share=asked.share)
            walk.take_machine()
            yield walk


def run_job(
    command: str,
    recipe: Path,
    asked: AskedJob,
    *,
    part: str | None = None,
    count: int = 1,
    only: Step | None = None,
) -> None:
    """Do what a command stands for, under signals, lock and progress; then say on stdout what came of it."""
    # Signals first: a job that is stopped while torch loads is stopped early like any other.
    with guarded(), stop_when_asked(asked.max_duration) as should_stop:
        from pipeline.recipe.load import load_recipe
        from pipeline.run import Walk
        from stages.machine.device import take_device
        from stages.watch import Watch
        from store import exclusive, shared

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        loaded = load_recipe(recipe, asked.set_ or (), os.environ)
        folder = asked.run or Path("runs") / loaded.name
        work, own = _work(command, count, only), _part(part) if command == "cache-teacher" else None
        fraction = loaded.gpu_memory_fraction
        # Before the processes meet: a group that uses GPUs asks CUDA which there are, and it is asked once only.
        take_device(loaded.device, share=asked.share, memory_fraction=fraction, warn=lambda why: say(f"warning: {why}"))
        # Several jobs may fill one store from one run folder; all else has the folder to itself.
        hold = shared if command == "cache-teacher" else exclusive
        with _together(command, should_stop) as processes, ExitStack() as held:
            processes.once(lambda: _enter(held, hold(folder, folder / ".kdpipe.lock")))
            watch = Watch(should_stop=should_stop)
            walk = Walk(loaded, folder, watch, own or processes.part, share=asked.share, processes=processes)
            walk.begin()
            with _kept(walk, command) as walk:
                with _shown(walk, asked) as shown:
                    processes.check(shown.watch)
                    with shown.phase(command):
                        results = work(shown)
                    shown.keep_recipe()
                if processes.first and (code := _tell(command, walk, results, asked.as_json)):
                    raise typer.Exit(code)


@contextmanager
def _kept(walk: Walk, command: str) -> Iterator[Walk]:
    """The walk with what keeps a record of it in the run folder: the log of events, and of sessions."""
    from pipeline.recipe.load import recipe_json
    from pipeline.session.event_log import event_log
    from pipeline.session.fingerprints import fingerprints
    from pipeline.session.run_record import session

    rank = walk.processes.rank if walk.processes.count > 1 else None
    with event_log(walk.run, command, rank=rank) as log:
        logged = replace(walk, watch=replace(walk.watch, report=log))
        if not walk.processes.first:
            yield logged
            return
        with session(walk.run, command, recipe_json(walk.recipe), argv=sys.argv[1:]) as own:
            own.note(device=str(walk.device))
            try:
                yield replace(logged, phase=own.phase)
            finally:
                own.note(fingerprints=fingerprints(walk))


@contextmanager
def _shown(walk: Walk, asked: AskedJob) -> Iterator[Walk]:
    """The walk with what shows it while it is under way: progress, and TensorBoard where that is asked for."""
    from pipeline.session.event_log import to_all
    from pipeline.session.tensorboard import scalars
    from pipeline.terminal.progress import reporter

    if not walk.processes.first:
        yield replace(walk, watch=replace(walk.watch, report=to_all(_pictures_told, walk.watch.report)))
        return
    with reporter(asked.as_json) as show, scalars(walk.run) if asked.tensorboard else nullcontext() as draw:
        reporters = [one for one in (show, walk.watch.report, draw) if one is not None]
        yield replace(walk, watch=replace(walk.watch, report=to_all(*reporters)))


@contextmanager
def _together(command: str, should_stop: Callable[[], bool]) -> Iterator[Processes]:
    """The processes of a launcher that do a command together. Each has its own part of the store in `cache-teacher`;
    what is not for several is refused.
    """
    from stages.processes import ONE, joined, require_one

    if command in TOGETHER:
        with joined(os.environ, should_stop) as processes:
            yield processes
        return
    if command != "cache-teacher":
        require_one(os.environ, f"kdpipe {command}")
    yield ONE


def _enter(held: ExitStack, context: AbstractContextManager[object]) -> None:
    held.enter_context(context)


def _pictures_told(event: Event) -> None:
    """The reporter of a process that is not the first: it tells of the pictures that only it sees."""
    from stages.watch import WARNING

    if event.unit == WARNING and event.stage == "data":
        say(f"warning: {event.job}")


def _work(command: str, count: int, only: Step | None) -> Callable[[Walk], dict[str, Any]]:
    from pipeline.commands.compare import walk_compare
    from pipeline.commands.generations import walk_generations
    from pipeline.run import STAGES, walk_all, walk_compress

    whole: dict[str, Callable[[Walk], dict[str, Any]]] = {
        "run": walk_all,
        "compress": partial(walk_compress, only=only),
        "compare": walk_compare,
        "generations": partial(walk_generations, count=count),
    }
    return whole[command] if command in whole else STAGES[command]


def _tell(command: str, walk: Walk, results: dict[str, Any], as_json: bool) -> int:
    """Say on stdout what came of it; the exit status."""
    from pipeline.commands.compare import print_compare
    from pipeline.commands.generations import print_generations
    from pipeline.commands.summary import print_summary
    from pipeline.report.command import tell_report
    from pipeline.report.compressed import draw_trade
    from pipeline.terminal.exit_codes import DONE

    if command in ("run", "compress"):
        draw_trade(walk.run)
    if command == "run":
        return tell_report([walk.run], as_json)
    if as_json:
        print_json({"command": command, "run": str(walk.run), **results})
    elif command == "compare":
        print_compare(walk.recipe.name, results)
    elif command == "generations":
        print_generations(walk.recipe.name, results)
    else:
        print_summary(command, walk.run, results)
    return DONE


def _part(text: str | None) -> Part:
    from stages.part import parse_part, part_from_environment

    return parse_part(text) if text is not None else part_from_environment(os.environ)
