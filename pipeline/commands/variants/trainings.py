"""Train many students from one store, in the order given, in several processes that share the trainings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.pipeline.run import Run
from kdpipe.pipeline.steps import train_student
from kdpipe.stages.compress.compress import CompressConfig, compress
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, StudentConfig, student_folder
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import LockedError, exclusive

POLL_S = 1.0
"""Seconds between looks at trainings of other processes."""

Results = dict[tuple[str, int], dict[str, Any] | None]
"""Results by a network's name and its seed; None for one that diverged."""


@dataclass(frozen=True)
class Training:
    """One training of a sweep, a comparison or a search.

    Attributes:
        name: The student's name.
        seed: Its seed.
        student: The recipe's `student` section.
        spec: The stores and losses; None for a student alone.
        student_run: Its folder and name.
        compress: How it is compressed, too; None if it is not.
    """

    name: str
    seed: int
    student: StudentConfig
    spec: DistillationSpec | None
    student_run: StudentRun
    compress: CompressConfig | None = None

    @property
    def compressed(self) -> Path:
        """The folder of its compressed networks."""
        return self.student_run.job_dir.path / "compressed"

    @property
    def file(self) -> Path:
        """The ONNX file of its compressed network."""
        assert self.compress is not None, "it is compressed"
        return JobDir(self.compressed / f"{self.compress.kinds[-1]}-seed{self.seed}").onnx

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train the student, or resume it, compress it if that is wanted, and return its results."""
        own = self.student_run
        result = train_student(self.student, self.seed, self.spec, context, student_run=own)
        if self.compress is None:
            return result
        fine_tuning = build_fine_tuning(
            self.student, self.seed, self.spec, context, self.compressed, student_dir=own.job_dir
        )
        config = replace(self.compress, baselines=False, target=self.compress.targets[0])
        return compress(config, fine_tuning)[self.compress.kinds[-1]]


def run_of(run: Path, command: str, name: str, seed: int) -> StudentRun:
    """Return folder and name of one student, which is not exported; alone, that of `kdpipe train-student`."""
    if name == ALONE:
        return StudentRun(student_folder(run, ALONE, seed), f"student {ALONE}, seed {seed}", with_onnx=False)
    return StudentRun(JobDir(run / command / name / f"seed{seed}"), f"{name}, seed {seed}", with_onnx=False)


def train_all(run: Run, command: str, trainings: Sequence[Training], context: StageContext | None = None) -> Results:
    """Train all that no other job works on, and wait for the others; `context` is by default the run's."""
    results: Results = {}
    waiting = list(trainings)
    while waiting:
        busy = []
        for training in waiting:
            with ExitStack() as locks:
                if not run.process_group.on_main(partial(_is_locked, training, locks)):
                    busy.append(training)
                    continue
                results[training.name, training.seed] = _trained(run, command, training, context or run.context)
            event = ProgressEvent(command, "all trainings", len(results), len(trainings), "training")
            run.monitor.report(event)
        if busy == waiting:
            run.monitor.warn_once(command, f"other processes train the last {len(busy)}: this one waits for them.")
            run.process_group.check_stop(run.monitor)
            time.sleep(POLL_S)
        waiting = busy
    return results


@contextmanager
def alone_at(run: Run, path: Path) -> Iterator[None]:
    """Wait until no other job holds the lock at `path`; processes that train together hold it once."""
    with ExitStack() as locks:

        def lock() -> None:
            locks.enter_context(exclusive(path.parent, path, check=run.monitor.check))

        run.process_group.on_main(lock)
        yield


def num_diverged(results: Mapping[tuple[str, int], dict[str, Any] | None]) -> dict[str, int]:
    """Return the number of diverged seeds by name, where there are any."""
    names = [name for (name, _), result in results.items() if result is None]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _is_locked(training: Training, locks: ExitStack) -> bool:
    """Return whether the training is locked for this job, until `locks` end."""
    path = training.student_run.job_dir.path
    try:
        locks.enter_context(exclusive(path, path / ".lock"))
    except LockedError:
        return False
    return True


def _trained(run: Run, command: str, training: Training, context: StageContext) -> dict[str, Any] | None:
    try:
        return training.run(context)
    except NotFiniteError as error:  # the others go on
        run.monitor.warn(command, str(error))
        return None
