"""Train generations: each student is the teacher of the next one.

Born-again networks, Furlanello et al. 2018 (arXiv 1805.04770): where student and teacher have the same architecture,
each generation may surpass the one before. Every generation has its own run folder, in which stages resume and skip
finished work as in any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdpipe.pipeline.preflight import preflight, require_losses, try_distillation
from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.report.formatting import interval_text, mean_std
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.run_stages import run_cache_teacher, run_train_teacher
from kdpipe.pipeline.steps import train_student
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.stages.distillation.student_config import DISTILLED, student_folder
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.intervals import accuracy_interval
from kdpipe.stages.evaluation.main_metric import best_value, main_percent, metric_of
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.teacher import TeacherConfig
from kdpipe.stages.train_student.preflight import dry_run_losses

SEED_STEP = 1000
"""Added to the recipe's seeds for each earlier generation, so that students start from new weights."""


def run_generations(run: Run, count: int) -> dict[str, Any]:
    """Train `count` generations, each from the store of the one before; return the results of all.

    The teacher of the first generation is the recipe's; that of each later one is the first seed's student before it.
    """
    if run.recipe.student.stores or run.recipe.cache.store:
        raise RecipeError("each generation has its own store: remove student.stores and cache.store from the recipe.")
    _check(run, count)
    generations, recipe = [], run.recipe
    for number in range(1, count + 1):
        own = replace(run, recipe=recipe, folder=run.folder / f"generation{number}")
        own.begin()
        with run.phase(own.folder.name):
            with_alone = number == 1 and recipe.student.baseline
            generations.append(_run_generation(own, number, with_alone=with_alone))
        own.write_recipe()
        recipe = next_recipe(recipe, own.folder)
    return {"generations": generations}


def _check(run: Run, count: int) -> None:
    """Check before training that the losses fit student and teacher, and student and student."""
    student, losses = run.recipe.student, run.recipe.distill
    require_losses(run)
    if count > 1 and any(isinstance(loss, SimKD) for loss in losses):
        raise RecipeError(
            "simkd makes the teacher's classifier part of the student, which then cannot teach another: use "
            "another loss for generations, or --count 1."
        )
    if count > 1 and student.image_size is not None:
        raise RecipeError(
            "student.image_size gives the student smaller views, and a student that teaches the next one needs the "
            "views of the store: remove it, or use --count 1."
        )
    run.check_losses_fit()
    preflight(run, compresses=False)
    if count > 1:
        model = build_student(student, student.seeds[0], run.context).model
        dry_run_losses(losses, student, model, run.context, where="from generation 2 on, distill")


def next_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of the next generation, whose teacher is the first student in the run folder `folder`."""
    student = recipe.student
    weights = student_folder(folder, DISTILLED, student.seeds[0]).model
    model = ModelConfig(name=student.model.name, args=student.model.args, weights=str(weights))
    seeds = tuple(seed + SEED_STEP for seed in student.seeds)
    return replace(
        recipe,
        # It was trained here, so that a low accuracy is no sign of a wrong scaling or order of classes.
        teacher=TeacherConfig(
            model=model, mean=student.mean, std=student.std, expected_accuracy=0, output=student.output
        ),
        student=replace(student, seeds=seeds),
    )


def _run_generation(run: Run, number: int, *, with_alone: bool) -> dict[str, Any]:
    teacher = run_train_teacher(run)["teacher"]
    run_cache_teacher(run, in_turn=True)
    student = run.recipe.student
    # The students alone of the first generation serve all: without a teacher, generations do not differ.
    alone = [train_student(student, seed, None, run.context) for seed in student.seeds] if with_alone else []
    try_distillation(run, run.distillation, student)
    distilled = [train_student(student, seed, run.distillation, run.context) for seed in student.seeds]
    return {"generation": number, "run": str(run.folder), "teacher": teacher, "alone": alone, "students": distilled}


def print_generations(recipe: str, results: dict[str, Any]) -> None:
    """Print the table to stdout."""
    first = results["generations"][0]
    tested = f"test {metric_of(first['teacher']).title} %"
    headers = ["network", "its teacher %", tested, "95 % interval", "best epoch %"]
    headers += ["agreement with its teacher %", "seeds"]
    cells = [_row("teacher", "", [first["teacher"]])]
    if first["alone"]:  # none with student.baseline = false
        cells.append(_row("student alone", "", first["alone"]))
    for result in results["generations"]:
        teacher = f"{main_percent(result['teacher']):.2f}"
        cells.append(_row(f"generation {result['generation']}", teacher, result["students"]))
    print_table(console(), Table(f"{recipe}: generations", headers, cells))


def _row(name: str, teacher: str, students: list[dict[str, Any]]) -> list[str]:
    accuracies = [main_percent(student) for student in students]
    agreements = [(student.get("examined") or {}).get("agreement") for student in students]
    interval = accuracy_interval(list(map(outcome_of, students)))
    known = [100 * agreement for agreement in agreements if agreement is not None]
    return [
        name,
        teacher,
        mean_std(mean(accuracies), stdev(accuracies) if len(accuracies) > 1 else None),
        interval_text(interval.in_percent if interval else None),
        f"{mean(100 * best_value(student) for student in students):.2f}",
        f"{mean(known):.2f}" if known and teacher else "",
        str(len(students)),
    ]
