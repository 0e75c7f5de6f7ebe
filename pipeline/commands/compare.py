"""`kdpipe compare`: the same student, from the same store, taught in each way that the recipe names, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pipeline.run import Walk, try_teaching, walk_cache_teacher, walk_train_teacher
from stages.compare import ALONE, Way, measure_costs, student_of, train_way
from stages.errors import NotFiniteError, RecipeError
from stages.train_student import train_student, view_warning


@dataclass(frozen=True)
class Row:
    """One way of teaching: percent of the test set at the last epoch over seeds, and at the best; how often it agrees
    with the teacher, and its divergence from it, in nats; milliseconds of a step, and their ratio to the student alone.
    """

    name: str
    accuracies: list[float]
    best_accuracy_mean: float
    agreement_mean: float | None
    teacher_kl_mean: float | None
    step_ms: float
    ratio: float

    @property
    def accuracy_mean(self) -> float:
        return mean(self.accuracies)

    @property
    def accuracy_std(self) -> float | None:
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_json(self) -> dict[str, Any]:
        spread = {"accuracy_mean": self.accuracy_mean, "accuracy_std": self.accuracy_std}
        return {**vars(self), **spread}


def walk_compare(walk: Walk) -> dict[str, Any]:
    """Train what is not trained yet, seed by seed, so that all ways are seen early; then measure what steps cost."""
    if not walk.recipe.compare:
        raise RecipeError(
            f"the recipe {walk.recipe.name} names no ways to compare: give it sections such as [compare.at] with a "
            "list of losses, as recipes/compare-losses.toml does."
        )
    teacher = None
    walk.rehearse_losses()
    if walk.store in walk.stores:
        teacher = walk_train_teacher(walk)["teacher"]
        walk_cache_teacher(walk)
        walk.processes.wait()  # each has computed its part of the store
    student, setup = walk.recipe.student, walk.setup
    if warning := view_warning(walk.recipe.views):
        walk.watch.warn("compare", warning)
    ways = [Way(ALONE, student, None), *_ways(walk)]
    results: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    for seed in student.seeds:
        results[ALONE].append(train_student(student, seed, None, setup))
        for way in ways[1:]:
            try:
                results[way.name].append(train_way(way, seed, setup))
            except NotFiniteError as error:  # one way's trouble is not that of the others
                walk.watch.warn("compare", str(error))
    costs = measure_costs(ways, setup)
    rows = [_row(name, own, costs[name]) for name, own in results.items() if own]
    diverged = {name: len(student.seeds) - len(own) for name, own in results.items() if len(own) < len(student.seeds)}
    return {"teacher": teacher, "rows": [row.to_json() for row in rows], "num_diverged": diverged}


def _ways(walk: Walk) -> list[Way]:
    """The recipe's ways, each checked before any student is trained."""
    ways = []
    for name, entry in walk.recipe.compare.items():
        student = student_of(entry, walk.recipe.student)
        try:
            teaching = walk.open_teaching(entry.distill, student) if entry.distill else None
            if teaching is not None:
                try_teaching(walk, teaching, student)
        except RecipeError as error:
            raise RecipeError(f"compare.{name}: {error}") from error
        ways.append(Way(name, student, teaching))
    return ways


def _row(name: str, results: Sequence[dict[str, Any]], cost: dict[str, float]) -> Row:
    examined = [result.get("examined") or {} for result in results]
    return Row(
        name,
        [100 * result["accuracy"] for result in results],
        mean(100 * result["best_accuracy"] for result in results),
        _mean([one.get("agreement") for one in examined], 100),
        _mean([one.get("teacher_kl") for one in examined], 1),
        cost["step_ms"],
        cost["ratio"],
    )


def _mean(values: Sequence[float | None], factor: float) -> float | None:
    known = [factor * value for value in values if value is not None]
    return mean(known) if known else None


def print_compare(recipe: str, results: dict[str, Any]) -> None:
    """The table, for people, on stdout: the best first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    num_seeds = len(results["rows"][0]["accuracies"])
    table = Table(box=box.SIMPLE, title=f"{recipe}: ways of teaching, {num_seeds} seeds", title_justify="left")
    table.add_column("way", no_wrap=True)
    for header in ("test accuracy %", "over alone", "best epoch %", "agrees %", "KL, nats", "ms a step", "of alone"):
        table.add_column(header, justify="right")
    alone = results["rows"][0]["accuracy_mean"]
    if results["teacher"]:
        table.add_row("teacher", f"{100 * results['teacher']['accuracy']:.2f}", "", "", "", "", "", "")
    for row in sorted(results["rows"], key=lambda one: -one["accuracy_mean"]):
        spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.2f}"
        table.add_row(
            row["name"],
            f"{row['accuracy_mean']:.2f}{spread}",
            f"{row['accuracy_mean'] - alone:+.2f}",
            f"{row['best_accuracy_mean']:.2f}",
            "-" if row["agreement_mean"] is None else f"{row['agreement_mean']:.2f}",
            "-" if row["teacher_kl_mean"] is None else f"{row['teacher_kl_mean']:.3f}",
            f"{row['step_ms']:.2f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)
    for name, number in results["num_diverged"].items():
        console.print(f"{name}: {number} of {num_seeds} seeds diverged: lower its weight, or the learning rate.")
