"""The end of a search: its winner over seeds on the test images, beside simpler ways to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kdpipe.pipeline.commands.search.best import write_best
from kdpipe.pipeline.commands.search.results import EPOCHS, best_trial, read_metrics, write_results
from kdpipe.pipeline.commands.search.trials import Trials, trial_context
from kdpipe.pipeline.commands.variants.compare import accuracy_row
from kdpipe.pipeline.commands.variants.trainings import Results, Training, run_of, train_all
from kdpipe.pipeline.recipe.sweep import SweepPoint
from kdpipe.pipeline.run import Run
from kdpipe.stages.distillation.student_config import ALONE
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.evaluation.main_metric import main_value
from kdpipe.store.fs.checksums import remove_with_sum

COMPARED = WINNER, ONE_EPOCH, RECIPE = "best", "one-epoch", "recipe"
"""The students that are compared: of the winner, of "keep the best after one epoch", and of the recipe as it is."""


def compare_winner(run: Run, trials: Trials) -> dict[str, Any]:
    """Train the winner and what it is compared with over the recipe's seeds, and write the record and best.toml.

    Here, and nowhere before, the test images are looked at.
    """
    winner = best_trial(trials.search)
    assert winner is not None, "a trial is complete"
    kept = after_one_epoch(trials)
    early = _best_of_kept(run, trials, kept)
    chosen = {WINNER: trials.point(winner), ONE_EPOCH: None if early is None else _point(trials, early)}
    chosen[RECIPE] = SweepPoint(RECIPE, {}, run.recipe.student, tuple(run.recipe.distill), run.recipe.compress)
    points = {name: point for name, point in chosen.items() if point is not None}
    trainings = list(_final_trainings(run, trials, {own.name: own for own in points.values()}))
    results = train_all(run, "search", trainings)
    for one in trainings:
        if (result := results[one.name, one.seed]) is not None:
            results[one.name, one.seed] = trials.objectives.measured(one, result)
    rows = _rows(run, trials, points, results)
    num_epochs = sum(trial.user_attrs.get(EPOCHS, 0) for trial in trials.search.trials("COMPLETE", "PRUNED", "FAIL"))
    final = {
        "rows": rows,
        "winner": winner.number,
        "one_epoch": early,
        "kept": kept,
        "num_epochs": {WINNER: num_epochs, ONE_EPOCH: _epochs_of_one_epoch(trials, kept)},
    }
    with trials.alone():
        record = write_results(trials.search, final=final)
        write_best(run, points[WINNER], record)
        for number in range(len(record["trials"])):
            for seed in trials.config.seeds:  # of pruned trials
                remove_with_sum(trials.job_dir(number, seed).checkpoint)
    return record


def after_one_epoch(trials: Trials) -> list[int]:
    """Return the trials that are the best after the first epoch of their first student, the best first."""
    found = {}
    for trial in trials.search.trials("COMPLETE", "PRUNED"):
        if metrics := read_metrics(trials.job_dir(trial.number, trials.config.seeds[0])):
            found[trial.number] = main_value(metrics[0])
    return sorted(found, key=lambda number: (-found[number], number))[: trials.config.keep]


def _best_of_kept(run: Run, trials: Trials, kept: Sequence[int]) -> int | None:
    """Return the best of some trials after all their epochs; those that were pruned are trained on."""
    seeds = trials.config.seeds
    context = trial_context(run, trials.config.objectives[0], run.context)
    points = {number: _point(trials, number) for number in kept}
    trainings = [trials.training(own, number, seed, _name(number)) for number, own in points.items() for seed in seeds]
    results = train_all(run, "search", trainings, context)
    values = {}
    for number in kept:
        own = [result for seed in seeds if (result := results[_name(number), seed]) is not None]
        if len(own) == len(seeds):
            values[number] = mean(map(main_value, own))
    return max(values, key=lambda number: (values[number], -number)) if values else None


def _name(number: int) -> str:
    return f"trial {number} to its end"


def _point(trials: Trials, number: int) -> SweepPoint:
    return trials.point(trials.search.trials()[number])


def _final_trainings(run: Run, trials: Trials, points: Mapping[str, SweepPoint]) -> Iterator[Training]:
    """Yield the trainings of the comparison, seed by seed; the student alone has the recipe's settings.

    Their folders are named after the trials: a search that goes on may find another winner.
    """
    specs = {
        name: run.open_distillation(point.losses, point.student) if point.losses else None
        for name, point in points.items()
    }
    recipe, folder = run.recipe, str(Path("search") / "final")
    compresses = recipe.compress if trials.config.compress else None
    for seed in recipe.student.seeds:
        if recipe.student.baseline:
            yield Training(ALONE, seed, recipe.student, None, run_of(run.folder, folder, ALONE, seed), compresses)
        for name, point in points.items():
            own = run_of(run.folder, folder, name, seed)
            yield Training(name, seed, point.student, specs[name], own, trials.compress_of(point))


def _rows(run: Run, trials: Trials, points: Mapping[str, SweepPoint], results: Results) -> list[dict[str, Any]]:
    """Return the results of each student over seeds, with its difference from the recipe's."""
    trained = {name: point.name for name, point in points.items()} | (
        {ALONE: ALONE} if run.recipe.student.baseline else {}
    )
    by_name = {name: [results[own, seed] for seed in run.recipe.student.seeds] for name, own in trained.items()}
    done = {name: [one for one in own if one is not None] for name, own in by_name.items()}
    if not done[WINNER]:
        raise NotFiniteError("the winner diverged with every seed of student.seeds: try lower learning rates.")
    return [
        {
            **accuracy_row(own, done[RECIPE]),
            "name": name,
            "settings": points[name].settings if name in points else {},
            "objectives": dict(zip(trials.config.objectives, trials.objectives.means(own), strict=True)),
        }
        for name, own in done.items()
        if own
    ]


def _epochs_of_one_epoch(trials: Trials, kept: Sequence[int]) -> int:
    """Return the epochs that training all trials for one epoch, and the kept ones to their end, takes."""
    others = len(trials.search.trials()) - len(kept)
    each = [_point(trials, number).student.train.epochs * len(trials.config.seeds) for number in kept]
    return others + sum(each)
