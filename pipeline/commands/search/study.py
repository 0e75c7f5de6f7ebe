"""The Optuna study of a search: a journal in the run folder, which plain Optuna and its dashboard open too."""

from __future__ import annotations

import fcntl
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.recipe.search.config import ACCURACIES, SearchConfig
from kdpipe.pipeline.recipe.search.space import Parameter, SearchSpace
from kdpipe.pipeline.report.variants import SEARCH_JOURNAL
from kdpipe.stages.errors import RecipeError, RunError, cause
from kdpipe.stages.numerics import derive_seed
from kdpipe.store.fs.lock import Holder, acquire, release

if TYPE_CHECKING:
    import optuna

JOURNAL = Path(SEARCH_JOURNAL).name
"""The journal of the study, in the folder `search` of a run; the study is named after the recipe."""


@dataclass(frozen=True)
class SearchStudy:
    """A study with what its trials are chosen from.

    Attributes:
        folder: The folder `search` of the run.
        space: The parameters.
        config: The recipe's section `search`.
        study: Optuna's study.
        grid: All combinations, if the sampler is "grid".
    """

    folder: Path
    space: SearchSpace
    config: SearchConfig
    study: optuna.Study
    grid: list[dict[str, Any]] | None

    @property
    def num_trials(self) -> int:
        """The number of trials of the whole search."""
        return self.config.trials if self.grid is None else min(self.config.trials, len(self.grid))

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in these states, such as "RUNNING", or all, by number."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=[TrialState[state] for state in states] or None)

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial, with one folder for each of its students."""
        return self.folder / "trials" / f"{number:04d}"

    def settings_of(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        """Return a trial's values by key, as a recipe has them."""
        known = {one.key: one for one in self.space.parameters}
        return {key: decoded(known[key], value) for key, value in trial.params.items() if key in known}

    def take(self) -> Taken | None:
        """Take a trial that no process works on, or choose a new one; None if there is none of either.

        Call it while no other process does. A trial that a killed or stopped process left is taken before a new one.
        """
        for trial in self.trials("RUNNING"):
            if (taken := self._locked(trial.number, trial._trial_id)) is not None:
                return taken
        waiting, number = self.trials("WAITING"), len(self.trials())
        if not waiting and number >= self.num_trials:
            return None
        if self.grid is not None and not waiting:
            own = self.grid[number]
            self.study.enqueue_trial(
                {one.key: encoded(own[one.key]) for one in self.space.parameters if one.is_in(own)}
            )
        asked = self.study.ask()
        taken = self._locked(asked.number, asked._trial_id)
        assert taken is not None, "others ask only afterwards"
        return taken

    def _locked(self, number: int, trial_id: int) -> Taken | None:
        lock = acquire(self.trial_folder(number) / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if isinstance(lock, Holder):
            return None
        if self.trials()[number].state.is_finished():  # by its process, just before this one got the lock
            release(lock)
            return None
        return Taken(number, self._suggest(number, trial_id), lock)

    def _suggest(self, number: int, trial_id: int) -> optuna.Trial:
        """Return the trial with values for all of its parameters; a seed for each makes them the same when resumed."""
        import optuna

        chosen: dict[str, Any] = {}
        trial = optuna.Trial(self.study, trial_id)
        for one in self.space.parameters:
            if one.is_in(chosen):
                self.study.sampler = _sampler(self.config, derive_seed(self.config.seed, "search", number, one.key))
                chosen[one.key] = decoded(one, _suggested(trial, one))
        return trial


@dataclass(frozen=True)
class Taken:
    """A running trial that this process works on, until its lock is released."""

    number: int
    trial: optuna.Trial
    lock: int

    def give_back(self) -> None:
        """Let another process take the trial, if it is not finished."""
        release(self.lock)


@contextmanager
def reported_errors(folder: Path) -> Iterator[None]:
    """Raise RunError for a journal that cannot be read."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise RunError(
            f"{folder / JOURNAL} is damaged ({cause(error)}): remove its last line if that is incomplete, or delete "
            f"{folder} to search from the start."
        ) from error


def open_study(folder: Path, name: str, config: SearchConfig, space: SearchSpace, num_epochs: int) -> SearchStudy:
    """Open the study in `folder`, and create it if there is none. Call it while no other process does.

    Args:
        folder: The folder `search` of the run.
        name: The name of the study.
        config: The recipe's section `search`.
        space: Its space.
        num_epochs: The most epochs of a trial.

    Raises:
        RecipeError: Optuna is not installed.
        RunError: The journal is damaged.
    """
    require_optuna()
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with reported_errors(folder):
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name=name,
            directions=["maximize" if one in ACCURACIES else "minimize" for one in config.objectives],
            sampler=_sampler(config, config.seed),
            pruner=_pruner(config, num_epochs),
            load_if_exists=True,
        )
        if study.metric_names is None:
            study.set_metric_names(list(config.objectives))
    return SearchStudy(folder, space, config, study, space.grid() if config.sampler == "grid" else None)


def require_optuna() -> None:
    """Raise RecipeError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise RecipeError("kdpipe search needs Optuna: pip install 'kdpipe[search]'.") from error


def encoded(value: Any) -> Any:
    """Return a choice as Optuna stores it: a list or table as its JSON text."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def decoded(parameter: Parameter, value: Any) -> Any:
    """Return a value from Optuna as a recipe has it."""
    if parameter.low is not None:
        return value
    return next(choice for choice in parameter.choices if encoded(choice) == value)


def _suggested(trial: optuna.Trial, parameter: Parameter) -> Any:
    key, low, high, step = parameter.key, parameter.low, parameter.high, parameter.step
    if low is None or high is None:
        return trial.suggest_categorical(key, [encoded(choice) for choice in parameter.choices])
    if parameter.is_whole:
        return trial.suggest_int(key, int(low), int(high), step=int(step or 1))
    return trial.suggest_float(key, low, high, step=step, log=parameter.log)


def _sampler(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    seed %= 2**32  # as numpy wants it
    return samplers.TPESampler(seed=seed) if config.sampler == "tpe" else samplers.RandomSampler(seed=seed)


def _pruner(config: SearchConfig, num_epochs: int) -> optuna.pruners.BasePruner:
    from optuna import pruners

    least, factor = min(config.min_epochs, num_epochs), config.reduction_factor
    match config.chosen_pruner:
        case "successive_halving":
            return pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=factor)
        case "hyperband":
            return pruners.HyperbandPruner(min_resource=least, max_resource=num_epochs, reduction_factor=factor)
        case "wilcoxon":
            return pruners.WilcoxonPruner(p_threshold=config.p_threshold)
    return pruners.NopPruner()
