"""`kdpipe generations`: the student becomes the teacher of the next one, and so on.

Born-again networks, Furlanello et al. 2018 (arXiv 1805.04770): where student and teacher have one architecture, each
generation may surpass the one before. Every generation has a run folder of its own, in which each stage resumes and
skips what is done as in any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.recipe.load import Recipe
from pipeline.run import Walk, require_losses, try_teaching, walk_cache_teacher, walk_train_teacher
from stages.errors import RecipeError
from stages.losses.simkd import SimKDConfig
from stages.models.build import ModelConfig
from stages.rehearse_losses import rehearse_losses
from stages.train_student import DISTILLED, fresh_student, student_folder, train_student
from stages.train_teacher import TeacherConfig

SEEDS_APART = 1000
"""A generation's seeds are the recipe's, plus so much for each generation before it: born again, not copied."""


def walk_generations(walk: Walk, count: int) -> dict[str, Any]:
    """Train `count` generations, each from the store of the one before; returns the figures of all.

    The first generation's teacher is the recipe's; the next one's is the first seed's student. Raises RecipeError for
    a recipe whose stores are named: each generation caches its own.
    """
    if walk.recipe.student.stores or walk.recipe.cache.store:
        raise RecipeError(
            "generations keep a store each in their own folders: leave out student.stores and cache.store."
        )
    _rehearse(walk, count)
    generations, recipe = [], walk.recipe
    for number in range(1, count + 1):
        own = replace(walk, recipe=recipe, run=walk.run / f"generation{number}")
        own.begin()
        with walk.phase(own.run.name):
            generations.append(_walk_one(own, number, with_alone=number == 1))
        own.keep_recipe()
        recipe = next_recipe(recipe, own.run)
    return {"generations": generations}


def _rehearse(walk: Walk, count: int) -> None:
    """Refuse, before anything is trained, losses by which the recipe's student cannot be taught by its teacher, or a
    student by one of its own kind.
    """
    student, losses = walk.recipe.student, walk.recipe.distill
    require_losses(walk)
    if count > 1 and any(isinstance(loss, SimKDConfig) for loss in losses):
        raise RecipeError(
            "simkd makes the teacher's classifier part of the student, which then teaches no other: use "
            "another loss for generations, or --count 1."
        )
    walk.rehearse_losses()
    if count > 1:
        own_kind = fresh_student(student, student.seeds[0], walk.setup).model
        rehearse_losses(losses, student, own_kind, walk.setup, where="from generation 2 on, distill")


def next_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe of the next generation: its teacher is the first student of the generation in the folder `run`."""
    student = recipe.student
    weights = student_folder(run, DISTILLED, student.seeds[0]).model
    model = ModelConfig(name=student.model.name, args=student.model.args, weights=str(weights))
    seeds = tuple(seed + SEEDS_APART for seed in student.seeds)
    return replace(
        recipe,
        teacher=TeacherConfig(model=model, mean=student.mean, std=student.std),
        student=replace(student, seeds=seeds),
    )


def _walk_one(walk: Walk, number: int, *, with_alone: bool) -> dict[str, Any]:
    teacher = walk_train_teacher(walk)["teacher"]
    walk_cache_teacher(walk)
    student = walk.recipe.student
    # That of the first generation serves all: without a teacher, one generation is like another.
    alone = [train_student(student, seed, None, walk.setup) for seed in student.seeds] if with_alone else []
    try_teaching(walk, walk.teaching, student)
    taught = [train_student(student, seed, walk.teaching, walk.setup) for seed in student.seeds]
    return {"generation": number, "run": str(walk.run), "teacher": teacher, "alone": alone, "students": taught}


def print_generations(recipe: str, results: dict[str, Any]) -> None:
    """The table, for people, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    table = Table(box=box.SIMPLE, title=f"{recipe}: generations", title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in ("its teacher %", "test accuracy %", "best epoch %", "agrees with its teacher %", "seeds"):
        table.add_column(header, justify="right")
    first = results["generations"][0]
    table.add_row("teacher", "", f"{100 * first['teacher']['accuracy']:.2f}", "", "", "1")
    _add(table, "student alone", "", first["alone"])
    for one in results["generations"]:
        _add(table, f"generation {one['generation']}", f"{100 * one['teacher']['accuracy']:.2f}", one["students"])
    console.print(table)


def _add(table: Any, name: str, teacher: str, students: list[dict[str, Any]]) -> None:
    accuracies = [100 * one["accuracy"] for one in students]
    spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    agreements = [(one.get("examined") or {}).get("agreement") for one in students]
    known = [100 * one for one in agreements if one is not None]
    table.add_row(
        name,
        teacher,
        f"{mean(accuracies):.2f}{spread}",
        f"{mean(100 * one['best_accuracy'] for one in students):.2f}",
        f"{mean(known):.2f}" if known and teacher else "",
        str(len(students)),
    )
