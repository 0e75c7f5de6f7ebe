"""The trials of a search: train their students, one after the other, in any number of processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.commands.search.objectives import Objectives
from kdpipe.pipeline.commands.search.results import EPOCHS, epochs_so_far, read_metrics, write_results
from kdpipe.pipeline.commands.search.study import SearchStudy, Taken, reported_errors
from kdpipe.pipeline.commands.variants.trainings import POLL_S, Training
from kdpipe.pipeline.recipe.sweep import SweepPoint
from kdpipe.pipeline.run import Run
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.errors import ModelError, NotFiniteError, RecipeError, StoppedEarly
from kdpipe.stages.evaluation.main_metric import main_value
from kdpipe.stages.runtime.callbacks import Callback, CallbackState
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.runtime.memory import is_out_of_memory
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import exclusive

if TYPE_CHECKING:
    import optuna


class TrialWatch(Callback):
    """The stop flag of trials: it reports the epochs of one to its study, and is set if the pruner ends the trial."""

    def __init__(self, run: Run, prunes: bool) -> None:
        self._should_stop, self._prunes = run.monitor.should_stop, prunes
        self._trial: optuna.Trial | None = None
        self._folder: Path | None = None
        self._num_seen = 0
        self.is_pruned = False

    def begin(self, trial: optuna.Trial, folder: Path) -> None:
        """Watch the training in `folder`."""
        self._trial, self._folder, self._num_seen, self.is_pruned = trial, folder, 0, False

    def __call__(self) -> bool:
        return self.is_pruned or self._should_stop()

    def on_run_start(self, state: CallbackState) -> None:
        self._observe_own(state)

    def on_epoch_end(self, state: CallbackState) -> None:
        self._observe_own(state)

    def _observe_own(self, state: CallbackState) -> None:
        if state.folder == self._folder:  # not a hint stage
            self.observe(state.history, state.num_epochs)

    def observe(self, history: Sequence[Mapping[str, Any]], num_epochs: int) -> None:
        """Report the epochs that were not yet, and ask the pruner after each but the last.

        Of a trial that continues it is asked about the last epoch again: the answer may have been lost.
        """
        unseen = history[self._num_seen :] if self._prunes else ()
        self._num_seen = len(history)
        for line in unseen:
            assert self._trial is not None, "the training that is watched"
            step = int(line["epoch"]) + 1
            is_new = report(self._trial, main_value(line), step)
            if (is_new or line is unseen[-1]) and step < num_epochs and self._trial.should_prune():
                self.is_pruned = True
                return


def report(trial: optuna.Trial, value: float, step: int) -> bool:
    """Report a value and return True, unless it was reported before the trial was interrupted."""
    if step in trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
        return False
    trial.report(value, step)
    return True


class Trials:
    """The trials of a run's search, which this process works on until none is left.

    Their students are judged on the validation images, which take the place of the test images: these are not read.
    """

    def __init__(self, run: Run, search: SearchStudy) -> None:
        self.run, self.search, self.config = run, search, search.config
        self.watch = TrialWatch(run, prunes=len(self.config.seeds) == 1 and self.config.chosen_pruner != "none")
        monitor = replace(run.monitor, should_stop=self.watch, callbacks=(*run.monitor.callbacks, self.watch))
        self.objectives = Objectives(run, self.config, search.folder)
        self.context = trial_context(run, self.config.objectives[0], replace(run.context, monitor=monitor))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from choosing trials inside the block."""
        folder = self.search.folder
        with exclusive(folder, folder / ".study.lock", check=self.run.monitor.check), reported_errors(folder):
            yield

    def work(self) -> None:
        """Train until every trial is complete, pruned or failed; wait for those of other processes."""
        while True:
            self.run.monitor.check()
            with self.alone():
                taken, running = self.search.take(), self.search.trials("RUNNING")
                write_results(self.search)
            if taken is not None:
                try:
                    self._finish(taken)
                finally:
                    taken.give_back()
            elif running:
                others = ", ".join(str(one.number) for one in running)
                self.run.monitor.warn_once(
                    "search", f"other processes train the last trials ({others}): waits for them."
                )
                time.sleep(POLL_S)
            else:
                return

    def _finish(self, taken: Taken) -> None:
        """Train a trial's students, and tell the study what came of it."""
        values: list[float] | None = None
        state, why = "FAIL", ""
        try:
            values = self._values(taken)
            state = "PRUNED" if values is None else "COMPLETE"
        except Exception as error:  # the others go on
            if not (isinstance(error, RecipeError | ModelError | NotFiniteError) or is_out_of_memory(error)):
                raise
            why = str(error).replace(str(self.run.folder), self.run.folder.name)
            self.run.monitor.warn("search", f"trial {taken.number} failed: {why}")
        with self.alone():
            self._tell(taken, state, values, why)
            write_results(self.search)
            num_done = sum(one.state.is_finished() for one in self.search.trials())
        event = ProgressEvent("search", "all trials", num_done, self.search.num_trials, "training")
        self.run.monitor.report(event)

    def _tell(self, taken: Taken, state: str, values: list[float] | None, why: str) -> None:
        from optuna.trial import TrialState

        if why:
            taken.trial.set_user_attr("why", why)
        done = epochs_so_far(self.search, taken.number)
        if state == "PRUNED" and len(self.config.seeds) == 1:  # another run may have trained it to its end
            done = max(self.search.trials()[taken.number].intermediate_values)
        taken.trial.set_user_attr(EPOCHS, done)
        self.search.study.tell(taken.trial, values, state=TrialState[state])

    def _values(self, taken: Taken) -> list[float] | None:
        """Return what the trial reaches in each objective, the mean over seeds; None if the pruner ended it."""
        point = self.point(self.search.trials()[taken.number])
        results: list[dict[str, Any]] = []
        seeds = self.config.seeds
        for number, seed in enumerate(seeds):
            result = self.train(point, taken.number, seed, taken.trial)
            if result is None:
                return None
            results.append(result)
            if len(seeds) > 1 and self.config.chosen_pruner == "wilcoxon":
                report(taken.trial, main_value(result), number)
                if number + 1 < len(seeds) and taken.trial.should_prune():
                    return None
        return self.objectives.means(results)

    def point(self, trial: optuna.trial.FrozenTrial) -> SweepPoint:
        """Return the student and losses of a trial."""
        return self.search.space.point(self.search.settings_of(trial), f"trial{trial.number:04d}")

    def train(self, point: SweepPoint, number: int, seed: int, trial: optuna.Trial) -> dict[str, Any] | None:
        """Train a student of a trial and return its results; None if the pruner ended it."""
        training = self.training(point, number, seed, f"trial {number}")
        job_dir = training.student_run.job_dir
        self.watch.begin(trial, job_dir.path)
        try:
            result = training.run(self.context)
        except StoppedEarly:
            if self.watch.is_pruned:
                return None
            raise
        # One that was finished before, perhaps by another run, is judged as if it were trained here.
        self.watch.observe(read_metrics(job_dir), point.student.train.epochs)
        return None if self.watch.is_pruned else self.objectives.measured(training, result)

    def training(self, point: SweepPoint, number: int, seed: int, name: str) -> Training:
        """Return the training of a trial's student."""
        spec = self.run.open_distillation(point.losses, point.student) if point.losses else None
        student_run = StudentRun(self.job_dir(number, seed), f"{name}, seed {seed}", with_onnx=False)
        return Training(name, seed, point.student, spec, student_run, self.compress_of(point))

    def job_dir(self, number: int, seed: int) -> JobDir:
        """Return the folder of a trial's student."""
        return JobDir(self.search.trial_folder(number) / f"seed{seed}")

    def compress_of(self, point: SweepPoint) -> CompressConfig | None:
        """Return how students with these settings are compressed; None if they are not."""
        return point.compress if self.config.compress else None


def trial_context(run: Run, objective: str, context: StageContext) -> StageContext:
    """Return the context of trials: the validation images in place of the test images, for agreement without labels."""
    deciding = context.deciding
    if objective == "agreement" and deciding.test_set.has_labels:
        unlabeled = replace(context, validation_set=keep_labels(deciding.test_set, "none"), load_validation=None)
        return unlabeled.deciding
    return deciding
