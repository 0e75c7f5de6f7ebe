"""`kdpipe modules`: list the modules of a recipe's networks, which losses on features name, with their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kdpipe.pipeline.recipe.dry_build import blank_context, without_weights
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.models.modules import ModuleOutput, list_modules
from kdpipe.stages.teacher import untrained_teacher

Modules = Mapping[str, Sequence[ModuleOutput]]


def run_modules(run: Run) -> Modules:
    """Return the modules of the teacher and of the student. Weights are not needed, data only if it sets the size.

    Raises:
        ModelError: A network cannot be built.
    """
    recipe = run.recipe
    context = blank_context(recipe) or run.context
    teacher = untrained_teacher(without_weights(recipe.teacher), recipe.seed, context)
    student = build_student(without_weights(recipe.student), recipe.student.seeds[0], context)
    own = recipe.student.context(context)
    return {
        "teacher": list_modules(teacher.model, context.image_shape),
        "student": list_modules(student.model, own.image_shape),
    }


def modules_json(found: Modules) -> dict[str, Any]:
    """Return the modules by network."""
    return {role: [asdict(module) for module in modules] for role, modules in found.items()}


def print_modules(names: Mapping[str, str], found: Modules) -> None:
    """Print a table of each network's modules; `names` are those of the networks."""
    screen = console()
    for role, modules in found.items():
        rows = [[one.path, one.kind, shape_text(one.shape)] for one in modules]
        print_table(screen, Table(f"{role}: {names[role]}", ["module", "class", "output"], rows, num_names=2))
    print('Losses on features take pairs: layers = [["STUDENT_MODULE", "TEACHER_MODULE"]].')  # noqa: T201


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape such as "64 x 8 x 8"."""
    return " x ".join(map(str, shape))
