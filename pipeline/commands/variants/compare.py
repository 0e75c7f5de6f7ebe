"""Compare losses: train the same student from the same store with each set of losses in the recipe, over its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdpipe.pipeline.commands.variants.trainings import Training, alone_at, num_diverged, run_of, train_all
from kdpipe.pipeline.preflight import preflight, try_distillation
from kdpipe.pipeline.report.differences import Outcomes, between
from kdpipe.pipeline.report.printing import full_report
from kdpipe.pipeline.report.variants import RESULTS, compare_table
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.run_stages import run_cache_teacher, run_train_teacher
from kdpipe.pipeline.shared_store import needs_teacher
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import print_short_table
from kdpipe.stages.distillation.student_config import ALONE, StudentConfig, view_warning
from kdpipe.stages.errors import NotFiniteError, RecipeError
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.intervals import accuracy_interval
from kdpipe.stages.evaluation.main_metric import ACCURACY, best_value, deciding, main_percent, metric_of
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.train_student.compare import (
    COST,
    Variant,
    build_step_job,
    measure_costs,
    with_overrides,
)
from kdpipe.stages.training.job_dir import write_json_file


def run_compare(run: Run) -> dict[str, Any]:
    """Train all variants, seed by seed so that all have early results; then measure the cost of a step.

    Several jobs that run the same command share the trainings.
    """
    if not run.recipe.compare:
        raise RecipeError(
            f"the recipe {run.recipe.name} has nothing to compare: add sections such as [compare.at] with a "
            "list of losses, as in recipes/compare-losses.toml."
        )
    with alone_at(run, run.folder / "compare" / ".teacher.lock"):
        teacher = prepare_store(run, "compare")
    student, context = run.recipe.student, run.context
    variants = _variants(run)
    trained = train_all(run, "compare", list(compare_trainings(run, variants)))
    results = {one.name: [own for seed in student.seeds if (own := trained[one.name, seed])] for one in variants}
    if not any(results.values()):
        raise NotFiniteError("every variant diverged: try lower weights of the losses, or a lower learning rate.")
    with alone_at(run, run.folder / "compare" / ".cost.lock"):  # the first of several jobs measures them
        costs = measure_costs(
            variants,
            partial(build_step_job, context=context),
            run.folder / "compare" / COST,
            device=run.device,
            monitor=run.monitor,
            process_group=run.process_group,
        )
    first = next(own for own in results.values() if own)
    rows = [{**accuracy_row(own, first), "name": name, **costs[name]} for name, own in results.items() if own]
    found = {"teacher": teacher, "rows": rows, "num_diverged": num_diverged(trained)}
    run.process_group.on_main(partial(write_json_file, run.folder / "compare" / RESULTS, found))
    return found


def prepare_store(run: Run, command: str) -> dict[str, Any] | None:
    """Check all students of the recipe, and cache the teacher where no store has its outputs; return its results."""
    features, teacher = list(run.check_losses_fit()), None
    trains_teacher = needs_teacher(run, features)
    preflight(run, with_teacher=trains_teacher, compresses=False)
    if trains_teacher:
        teacher = run_train_teacher(run)["teacher"]
        run_cache_teacher(run, in_turn=True)
        run.process_group.barrier()  # each has computed its part of the store
    if warning := view_warning(run.recipe.views):
        run.monitor.warn(command, warning)
    if run.context.validation_set is None:
        run.monitor.warn(
            command,
            "the students are ranked by their accuracy on the test images, where the best of many looks better than it "
            "is: set data.validation_share to choose by other images.",
        )
    return teacher


def variants_of(run: Run) -> dict[str, tuple[tuple[Loss, ...], StudentConfig]]:
    """Return losses and student of each variant by its name, the student alone first."""
    student = run.recipe.student
    alone: dict[str, tuple[tuple[Loss, ...], StudentConfig]] = {ALONE: ((), student)} if student.baseline else {}
    others = run.recipe.compare.items()
    return alone | {name: (entry.distill, with_overrides(entry, student)) for name, entry in others}


def _variants(run: Run) -> list[Variant]:
    """Return the student alone and the recipe's variants, each checked before any student is trained."""
    variants = []
    for name, (losses, student) in variants_of(run).items():
        try:
            spec = run.open_distillation(losses, student) if losses else None
            if spec is not None:
                try_distillation(run, spec, student)
        except RecipeError as error:
            raise RecipeError(f"compare.{name}: {error}") from error
        variants.append(Variant(name, student, spec))
    return variants


def compare_trainings(run: Run, variants: Sequence[Variant]) -> Iterator[Training]:
    """Yield the trainings of a comparison in their order."""
    for seed in run.recipe.student.seeds:
        for one in variants:
            student_run = run_of(run.folder, "compare", one.name, seed)
            yield Training(one.name, seed, one.student, one.spec, student_run)


def accuracy_row(results: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a student's results over seeds: accuracies (or what `metric` names) and agreement in percent, KL in nats.

    With those of the `first` student, its difference from them: interval and p over the same seeds.
    """
    examined = [result.get("examined") or {} for result in results]
    accuracies = [main_percent(result) for result in results]
    metric = metric_of(results[0])
    validates = all("validation" in result for result in results)
    interval = accuracy_interval(list(map(outcome_of, results)))
    return {
        **({} if metric == ACCURACY else {"metric": metric.name}),
        "accuracies": accuracies,
        "best_accuracy_mean": mean(100 * best_value(result) for result in results),
        "validation_mean": mean(main_percent(deciding(result)) for result in results) if validates else None,
        "agreement_mean": _mean([metrics.get("agreement") for metrics in examined], 100),
        "teacher_kl_mean": _mean([metrics.get("teacher_kl") for metrics in examined], 1),
        "accuracy_mean": mean(accuracies),
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracy_interval": None if interval is None else asdict(interval.in_percent),
        **_difference(first, results),
    }


def _difference(first: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a variant's difference from the first one: percentage points, interval and p over the same seeds."""
    outcomes: Outcomes = {"first": list(map(outcome_of, first)), "own": list(map(outcome_of, results))}
    found = between(outcomes, "own", "first") if first is not results and len(first) == len(results) else None
    if found is None:
        return {"interval": None, "p": None}
    return {"interval": None if found.interval is None else asdict(found.interval), "p": found.p}


def _mean(values: Sequence[float | None], factor: float) -> float | None:
    known = [factor * value for value in values if value is not None]
    return mean(known) if known else None


def print_compare(recipe: str, folder: Path, results: dict[str, Any]) -> None:
    """Print the table to stdout, the best variant first."""
    out, num_seeds = console(), len(results["rows"][0]["accuracies"])
    print_short_table(out, compare_table(recipe, results), full_report(folder))
    for name, number in results["num_diverged"].items():
        out.print(f"{name}: {number} of {num_seeds} seeds diverged: try a lower weight or learning rate.")
