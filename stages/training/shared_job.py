"""Begin a job: take the results of the same job in another run of the workspace, or its turn to train."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from kdpipe.stages.context import StageContext
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.stages.workspace import RECIPE, shown
from kdpipe.store import KdpipeError, differences, make_folders
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX, write_atomically
from kdpipe.store.fs.checksums import SUMS, damages, move_with_sums, read_sums
from kdpipe.store.redact import redacted_json

STUDENTS = ("students/*", "sweep/*/*", "compare/*/*", "search/*/*/*")
"""Where the students of a run are."""

ORIGIN = "origin.json"
"""The file in the folder of a job that was taken over: the folder that made it, relative to this one. It has no sum."""

Accept = Callable[[Path, Mapping[str, Any]], bool]
"""Whether the results of a job in another run folder do for this run."""


@contextmanager
def begun_job(
    job_dir: JobDir,
    fingerprint: Mapping[str, Any],
    context: StageContext,
    *,
    stage: str,
    name: str,
    accept: Accept = lambda run, result: True,
) -> Iterator[dict[str, Any] | None]:
    """Claim the folder for the job with this fingerprint; yield its results if it is finished, else None.

    The same job, finished in another run of the workspace, is linked into the folder. While another process works on
    it, this one waits; inside the block others wait for this one.

    Raises:
        FingerprintMismatch: The folder holds another job.
    """
    with ExitStack() as turn:
        group, workspace = context.process_group, context.workspace

        def begin() -> dict[str, Any] | None:
            job_dir.begin(fingerprint)
            return job_dir.result()

        def adopt() -> dict[str, Any] | None:
            if source := _adopt(job_dir, context, accept):
                used = f"uses the {name} of {shown(source)}"
                context.monitor.report(ProgressEvent(stage, used, 1, 1, "network"))
            return begin()

        done = group.on_main(begin)
        if done is None and workspace.folder is not None:
            turn.enter_context(workspace.turn(stage, name, fingerprint, context.monitor, group))
            done = group.on_main(adopt)
        yield done


def _adopt(job_dir: JobDir, context: StageContext, accept: Accept) -> Path | None:
    """Give a begun job the files of a finished one with the same inputs; return the run that has it, None if none."""
    wanted = read_json_file(job_dir.path / "job.json")
    for run, found in _finished(job_dir, wanted, context, accept):
        with suppress(KdpipeError, OSError):  # damaged, or being removed
            _link(found, job_dir.path)
            return run
    return None


def offered(
    job_dir: JobDir, fingerprint: Mapping[str, Any], context: StageContext, accept: Accept = lambda run, result: True
) -> Path | None:
    """Return a run folder of the workspace where the job with this fingerprint is finished; None if none."""
    inputs = redacted_json(json.loads(json.dumps(fingerprint)))
    return next((run for run, _ in _finished(job_dir, inputs, context, accept)), None)


def _finished(
    job_dir: JobDir, wanted: Mapping[str, Any] | None, context: StageContext, accept: Accept
) -> Iterator[tuple[Path, Path]]:
    """Yield the runs that made a job with the same inputs, as far as they still have it, and a folder that has it."""
    try:
        place = job_dir.path.absolute().relative_to(context.run_dir.absolute())
    except ValueError:
        return
    for run in (context.run_dir, *context.workspace.runs(context.run_dir)):
        for folder in _jobs_like(run, place):
            is_one = False
            with suppress(KdpipeError, OSError):  # damaged, or being removed
                is_one = _same(folder, wanted) and accept(run, JobDir(folder).result() or {})
            if is_one:
                yield _maker(run, folder, wanted), folder


def _jobs_like(run: Path, place: Path) -> Iterator[Path]:
    """Yield the folders of a run in which a job may be: the same place, and for a student those of all students."""
    yield run / place
    for pattern in STUDENTS if len(place.parts) > 1 else ():
        yield from sorted(run.glob(pattern))


def _maker(run: Path, folder: Path, wanted: Mapping[str, Any] | None) -> Path:
    """Return the run that made the job in a folder: where it was taken from if that is still there, else `run`."""
    with suppress(KdpipeError, OSError):
        named = (read_json_file(folder / ORIGIN) or {}).get("folder")
        if isinstance(named, str) and _same(made := Path(os.path.normpath(folder / named)), wanted):
            return next((path for path in made.parents if (path / RECIPE).exists()), run)
    return run


def _same(folder: Path, wanted: Mapping[str, Any] | None) -> bool:
    """Return whether a folder has a finished job with these inputs, whose files have sums."""
    is_finished = (folder / "result.json").exists() and (folder / SUMS).exists()
    return is_finished and not differences(read_json_file(folder / "job.json"), wanted)


def _link(source: Path, target: Path) -> None:
    """Add hard links to the files of a finished job to the folder of a begun one, or copies; their sums are checked.

    It is recorded where they are from: the folder that made them, as far as that is known.

    Raises:
        DamagedFileError: A file is not as it was written.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    folders = [path for path in sorted(source.iterdir()) if path.is_dir() and (path / SUMS).exists()]
    try:
        for folder in (source, *folders):
            own = temporary / folder.relative_to(source)
            make_folders([own])
            for name in (*read_sums(folder), SUMS):
                _link_or_copy(folder / name, own / name)
            for damage in damages(own):
                raise damage
        write_atomically(target / ORIGIN, json.dumps({"folder": _origin(source, target)}).encode())
        for folder in (*folders, source):
            own = target / folder.relative_to(source)
            make_folders([own])
            move_with_sums(temporary / folder.relative_to(source), own, "result.json")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _origin(source: Path, target: Path) -> str:
    """Return the folder that made the job in `source`, relative to `target`."""
    before = (read_json_file(source / ORIGIN) or {}).get("folder", "")
    return os.path.relpath(source.absolute() / str(before), target.absolute())


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target, follow_symlinks=False)
