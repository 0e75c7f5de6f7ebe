"""Cohorts: students that teach each other, each beside the same student alone, and what comes out as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdpipe.pipeline.commands.search.best import recipe_toml
from kdpipe.pipeline.commands.variants.compare import accuracy_row
from kdpipe.pipeline.preflight import require_losses
from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.report.printing import full_report
from kdpipe.pipeline.report.variants import RESULTS, cohort_table
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.run_stages import take_store
from kdpipe.pipeline.steps import train_student
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import print_short_table
from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.exchange import CohortPlan
from kdpipe.stages.cohort.train import STAGE, check_cohort, ensemble_folder, member_folder, train_cohort, try_cohort
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, student_folder
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.evaluation.main_metric import deciding, main_percent, main_value
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.teacher import TeacherConfig
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import write_json_file
from kdpipe.store import make_folders
from kdpipe.store.fs.atomic_write import write_atomically

TEACHER_RECIPE = "teacher.toml"


@dataclass(frozen=True)
class Kept:
    """The network that a cohort hands over: its name, folder and metric on the images that decide."""

    name: str
    folder: Path
    value: float


def run_cohort(run: Run) -> dict[str, Any]:
    """Train the students of each seed alone, then together; write and return the table of all."""
    recipe, context = run.recipe, run.context
    if (config := recipe.cohort) is None:
        raise RecipeError(f"the recipe {recipe.name} has no cohort: add a section [cohort], as in recipes/cohort.toml.")
    check_cohort(config, recipe.student, context.resized(recipe.student.image_size))
    plan = CohortPlan(config, recipe.student, _specs(run, config))
    try_cohort(plan, context)
    if context.validation_set is None and config.keep == "best":
        run.monitor.warn(
            STAGE,
            "the best member is chosen by its accuracy on the test images, where the best of several looks better than "
            "it is: set data.validation_share to choose by other images.",
        )
    alone: list[list[dict[str, Any]]] = []
    together: list[dict[str, Any]] = []
    for seed in recipe.student.seeds:
        if recipe.student.baseline:
            alone.append(_train_alone(run, config, seed))
        together.append(train_cohort(plan, seed, context))
    kept = _kept(run, config, together)
    found = {
        "method": config.method,
        "rows": _rows(config, alone, together),
        "kept": {"name": kept.name, "folder": str(kept.folder)},
    }
    run.process_group.on_main(partial(_write, run, kept, found))
    return found


def _specs(run: Run, config: CohortConfig) -> list[DistillationSpec]:
    """Open the stores for each member; none without a teacher."""
    if not config.with_teacher:
        return []
    require_losses(run)
    take_store(run)
    found: dict[str, DistillationSpec] = {}
    models = config.models(run.recipe.student.model)
    for model in models:
        if str(model) not in found:
            student = replace(run.recipe.student, model=model)
            found[str(model)] = run.open_distillation(run.recipe.distill, student)
    return [found[str(model)] for model in models]


def _train_alone(run: Run, config: CohortConfig, seed: int) -> list[dict[str, Any]]:
    """Train each member's network alone, once for equal ones; return the results by member."""
    student, found = run.recipe.student, dict[str, dict[str, Any]]()
    models = config.models(student.model)
    for number, model in enumerate(models):
        if str(model) in found:
            continue
        kind = ALONE if model == student.model else f"cohort-{number + 1}-{ALONE}"
        name = f"student {ALONE}" if kind == ALONE else f"member {number + 1} {ALONE}"
        own = StudentRun(student_folder(run.folder, kind, seed), f"{name}, seed {seed}")
        found[str(model)] = train_student(replace(student, model=model), seed, None, run.context, student_run=own)
    return [found[str(model)] for model in models]


def _rows(
    config: CohortConfig, alone: Sequence[Sequence[dict[str, Any]]], together: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of the table: each network alone, each member, their mean, and the ensemble.

    The ensemble is compared with the best network alone.
    """
    members = range(config.num_members)
    bases = [[results[number] for results in alone] for number in members]
    rows = [
        {"name": ALONE if number == 0 else f"{ALONE}, as member {number + 1}", **accuracy_row(base), "alone_mean": None}
        for number, base in enumerate(bases)
        if base and base not in bases[:number]
    ]
    own = [_row(f"member {n + 1}", [results["members"][n] for results in together], bases[n]) for n in members]
    best = max(bases, key=lambda base: sum(map(main_value, base)))
    ensemble = _row("ensemble", [results["ensemble"] for results in together], best)
    return [*rows, *own, _mean_row(own), ensemble]


def _row(name: str, results: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a network's results over seeds, with their difference from the network alone, if that was trained."""
    alone_mean = mean(map(main_percent, alone)) if alone else None
    return {"name": name, **accuracy_row(results, alone), "alone_mean": alone_mean}


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the members, seed by seed."""
    means = [mean(accuracies) for accuracies in zip(*(row["accuracies"] for row in rows), strict=True)]
    bases = [row["alone_mean"] for row in rows]
    return {
        **dict.fromkeys(rows[0]),
        **({"metric": rows[0]["metric"]} if "metric" in rows[0] else {}),
        "name": f"mean of {len(rows)} members",
        "accuracies": means,
        "accuracy_mean": mean(means),
        "accuracy_std": stdev(means) if len(means) > 1 else None,
        "best_accuracy_mean": mean(row["best_accuracy_mean"] for row in rows),
        "alone_mean": None if None in bases else mean(bases),
    }


def _kept(run: Run, config: CohortConfig, together: Sequence[dict[str, Any]]) -> Kept:
    """Return the best member, or ensemble, of all seeds, on the images that decide; of equal ones the first."""
    found = []
    for seed, results in zip(run.recipe.student.seeds, together, strict=True):
        if config.keep == "ensemble":
            folder = ensemble_folder(run.folder, seed).path
            found.append(Kept(f"ensemble, seed {seed}", folder, main_value(deciding(results["ensemble"]))))
            continue
        for number, result in enumerate(results["members"]):
            folder = member_folder(run.folder, number, seed).path
            found.append(Kept(f"member {number + 1}, seed {seed}", folder, main_value(deciding(result))))
    return max(found, key=lambda one: one.value)


def _write(run: Run, kept: Kept, found: Mapping[str, Any]) -> None:
    """Write the record of the table, and the recipe whose teacher is the kept network."""
    make_folders([run.folder / STAGE])
    write_json_file(run.folder / STAGE / RESULTS, dict(found))
    head = (
        f"# The teacher is {kept.name} of {run.folder}. Losses on features are left out: their layers are of another."
    )
    text = f"{head}\n{recipe_toml(teacher_recipe(run.recipe, kept.folder))}"
    write_atomically(run.folder / STAGE / TEACHER_RECIPE, text.encode())


def teacher_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the network in a job's folder as its teacher, without a cohort.

    Losses on features are left out: their layers are those of another teacher.
    """
    weights = folder / "model.safetensors"
    record = load_tensors(weights)[1]
    architecture, scaling = record["architecture"], record["normalization"]
    model = ModelConfig(name=architecture["model"], args=architecture["args"], weights=str(weights))
    # It was trained here, so that a low accuracy is no sign of a wrong scaling or order of classes.
    mean_of, std_of = tuple(scaling["mean"]), tuple(scaling["std"])
    teacher = TeacherConfig(model=model, mean=mean_of, std=std_of, expected_accuracy=0)
    return replace(
        recipe,
        name=f"{recipe.name[:180]}-taught",
        teacher=teacher,
        cohort=None,
        distill=tuple(loss for loss in recipe.distill if not loss.student_layers()) or (KD(),),
        cache=replace(recipe.cache, store=None),
        student=replace(recipe.student, stores=()),
    )


def print_cohort(recipe: str, folder: Path, found: Mapping[str, Any]) -> None:
    """Print the table to stdout, and how to go on."""
    out = console()
    print_short_table(out, cohort_table(recipe, found), full_report(folder))
    kept = found["kept"]
    out.print(f"kept: {kept['name']}, in {kept['folder']}", soft_wrap=True)
    out.print(f"as a teacher: kdpipe run {folder / STAGE / TEACHER_RECIPE}", soft_wrap=True)
