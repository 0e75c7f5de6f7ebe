"""Sweep: train students from one store with all combinations of some settings, over seeds, in several processes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tabulate import tabulate

from kdpipe.pipeline.commands.variants.compare import accuracy_row, prepare_store
from kdpipe.pipeline.commands.variants.trainings import Results, Training, alone_at, num_diverged, run_of, train_all
from kdpipe.pipeline.preflight import try_distillation
from kdpipe.pipeline.recipe.sweep import SweepPoint, alone_of, as_override, short_names
from kdpipe.pipeline.report.printing import full_report
from kdpipe.pipeline.report.variants import RESULTS, ranking_accuracy, sweep_table
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import print_short_table
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, StudentConfig
from kdpipe.stages.errors import NotFiniteError, RecipeError
from kdpipe.stages.evaluation.main_metric import main_value
from kdpipe.stages.training.job_dir import write_json_file
from kdpipe.store.fs.atomic_write import write_atomically


def run_sweep(run: Run) -> dict[str, Any]:
    """Train all combinations, seed by seed so that all have early results; then write and return their table.

    Several processes that run the same command share the trainings: each takes one that no other works on.
    """
    points, folder = run.recipe.points, run.folder / "sweep"
    if not points:
        raise RecipeError(
            f"the recipe {run.recipe.name} has nothing to sweep: give a key several values, as in "
            "--set student.train.lr=0.05,0.1, or add a section [sweep]."
        )
    with alone_at(run, folder / ".teacher.lock"):
        teacher = prepare_store(run, "sweep")
    specs = {point.name: _open(run, point) for point in points}
    alone = _names_of_alone(run, points) if run.recipe.student.baseline else {}
    results = train_all(run, "sweep", list(sweep_trainings(run, points, specs)))
    if not any(results.values()):
        raise NotFiniteError("every training diverged: try a lower learning rate, or lower weights of the losses.")
    rows = [_row(point, results, alone, run.recipe.student.seeds) for point in points]
    rows = sorted((row for row in rows if row["accuracies"]), key=ranking_accuracy, reverse=True)
    found = {
        "teacher": teacher,
        "keys": list(points[0].settings),
        "rows": rows,
        "best": rows[0]["settings"] if rows else None,
        "num_diverged": num_diverged(results),
    }
    run.process_group.on_main(partial(write_tables, folder, found))
    return found


def _open(run: Run, point: SweepPoint) -> DistillationSpec:
    """Open the stores for a combination, and try its first training task, before anything is trained."""
    try:
        spec = run.open_distillation(point.losses, point.student)
        try_distillation(run, spec, point.student)
    except RecipeError as error:
        raise RecipeError(f"sweep {point.name}: {error}") from error
    return spec


def _names_of_alone(run: Run, points: Sequence[SweepPoint]) -> dict[str, tuple[str, StudentConfig]]:
    """Return name and configuration of the student alone that each point is compared with, by the point's name.

    It has the settings of the point that a student alone has too; points that share them share it.
    """
    names = short_names(list(points[0].settings))
    found = {}
    for point in points:
        own = ",".join(point.name.split(",")[number] for number, key in enumerate(names) if key in point.of_student)
        found[point.name] = (f"{ALONE},{own}" if own else ALONE), alone_of(point)
    return found


def sweep_trainings(
    run: Run, points: Sequence[SweepPoint], specs: Mapping[str, DistillationSpec] = MappingProxyType({})
) -> Iterator[Training]:
    """Yield the trainings of a sweep in their order; without `specs` only to look at their folders."""
    alone = _names_of_alone(run, points) if run.recipe.student.baseline else {}
    for seed in run.recipe.student.seeds:
        for name, student in dict(alone.values()).items():
            yield Training(name, seed, student, None, run_of(run.folder, "sweep", name, seed))
        for point in points:
            student_run = run_of(run.folder, "sweep", point.name, seed)
            yield Training(point.name, seed, point.student, specs.get(point.name), student_run)


def _row(
    point: SweepPoint,
    results: Results,
    alone: Mapping[str, tuple[str, StudentConfig]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return a combination's results over seeds, and the gain over its student alone, paired by seed, in points."""
    name = alone[point.name][0] if alone else None
    own = {seed: result for seed in seeds if (result := results[point.name, seed]) is not None}
    base = {seed: result for seed in own if name is not None and (result := results[name, seed]) is not None}
    gains = [100 * (main_value(own[seed]) - main_value(base[seed])) for seed in base]
    return {
        "name": point.name,
        "settings": dict(point.settings),
        **(accuracy_row(list(own.values()), list(base.values())) if own else {"accuracies": []}),
        "alone": accuracy_row(list(base.values())) if base else None,
        "gains": gains,
        "gain_mean": sum(gains) / len(gains) if gains else None,
    }


def write_tables(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the table of a sweep as JSON, CSV, Markdown and LaTeX."""
    table = sweep_table("", found)
    write_json_file(folder / RESULTS, dict(found))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*found["keys"], "seeds", "accuracy_mean", "accuracy_std", "alone_mean", "gain_mean"])
    for row in found["rows"]:
        alone = (row["alone"] or {}).get("accuracy_mean")
        figures = [len(row["accuracies"]), row["accuracy_mean"], row["accuracy_std"], alone, row["gain_mean"]]
        writer.writerow([*row["settings"].values(), *figures])
    write_atomically(folder / "results.csv", text.getvalue().encode())
    for name, style in (("results.md", "github"), ("results.tex", "latex_booktabs")):
        text_table = tabulate(table.rows, [*map(str, table.headers)], tablefmt=style, disable_numparse=True)
        write_atomically(folder / name, f"{text_table}\n".encode())


def print_sweep(recipe: str, folder: Path, found: Mapping[str, Any]) -> None:
    """Print the table to stdout, the best combination first, and where its files are."""
    out, rows = console(), found["rows"]
    print_short_table(out, sweep_table(recipe, found), full_report(folder))
    num_seeds = max(len(row["accuracies"]) for row in rows)
    for name, number in found["num_diverged"].items():
        out.print(f"{name}: {number} of {num_seeds} seeds diverged.")
    settings = " ".join(as_override(key, value) for key, value in rows[0]["settings"].items())
    images = "test" if rows[0]["validation_mean"] is None else "validation"
    out.print(f"best on the {images} images: {settings}", soft_wrap=True)
    out.print(f"the table as CSV, Markdown, LaTeX and JSON: {folder / 'sweep'}", soft_wrap=True)
