"""The record of a search: its trials, and what they cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.commands.search.study import SearchStudy
from kdpipe.pipeline.report.variants import RESULTS
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.store.fs.safe_read import read_regular_file

if TYPE_CHECKING:
    import optuna

MAX_METRICS_BYTES = 2**26

EPOCHS = "epochs"
"""The attribute of a finished trial that has the number of its epochs: a pruned one may be trained on at the end."""


def write_results(search: SearchStudy, **more: Any) -> dict[str, Any]:
    """Write the record of a search with what is known of its trials, and return it; in one process at a time."""
    path = search.folder / RESULTS
    known = read_json_file(path) or {}
    trials = search.trials()
    best = best_trial(search)
    is_over = len(trials) >= search.num_trials and all(one.state.is_finished() for one in trials)
    record = {
        "objectives": list(search.config.objectives),
        "sampler": search.config.sampler,
        "pruner": search.config.chosen_pruner,
        "keys": [one.key for one in search.space.parameters],
        "num_trials": search.num_trials,
        "counts": dict(Counter(one.state.name.lower() for one in trials)),
        "best": None if best is None else best.number,
        "front": sorted(one.number for one in search.study.best_trials) if best is not None else [],
        "trials": [_trial_json(search, one) for one in trials],
        **({"final": known["final"]} if "final" in known and is_over else {}),
        **more,
    }
    write_json_file(path, record)
    return record


def best_trial(search: SearchStudy) -> optuna.trial.FrozenTrial | None:
    """Return the first of the complete trials with the highest accuracy or agreement; None if none is complete."""
    complete = search.trials("COMPLETE")
    return max(complete, key=lambda one: (one.values[0], -one.number)) if complete else None


def _trial_json(search: SearchStudy, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return a trial's settings and what it reached; values are shares of 1, or counts."""
    known = trial.user_attrs.get(EPOCHS)
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": trial.values if trial.state.is_finished() else None,
        "settings": search.settings_of(trial),
        "num_epochs": epochs_so_far(search, trial.number) if known is None else known,
        **({"why": trial.user_attrs["why"]} if "why" in trial.user_attrs else {}),
    }


def epochs_so_far(search: SearchStudy, number: int) -> int:
    """Return the number of epochs that the students of a trial have been trained for."""
    folder = search.trial_folder(number)
    return sum(len(read_metrics(JobDir(folder / f"seed{seed}"))) for seed in search.config.seeds)


def read_metrics(job_dir: JobDir) -> list[Mapping[str, Any]]:
    """Return the metrics of a training's epochs so far."""
    try:
        text = read_regular_file(job_dir.metrics, MAX_METRICS_BYTES).decode()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]


def folder_of(run: Path) -> Path:
    """Return the folder of a run's search."""
    return run / "search"
