"""The jobs that a recipe asks for, for the progress of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.terminal.whole_run import PlannedJob
from kdpipe.stages.compress.artifacts.export_student import export_name
from kdpipe.stages.compress.compress import fine_tunings
from kdpipe.stages.compress.names import network_name
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED

FORWARD_SHARE = 1 / 3
"""The cost of an image in a forward pass, as a share of that in a training step."""


def planned_jobs(recipe: Recipe, stages: Sequence[str]) -> list[PlannedJob]:
    """Return the jobs of some stages of a recipe, in order."""
    teacher, student = recipe.teacher.train, recipe.student
    jobs = [PlannedJob("train-teacher", "teacher", "teacher", teacher.epochs if teacher else 0)]
    store = Path(recipe.cache.store or "store.zarr").name
    jobs += [PlannedJob("cache-teacher", store, "store", FORWARD_SHARE * recipe.views.num_stored)]
    for number, seed in enumerate(student.seeds, 1):
        for kind in [ALONE] * student.baseline + [DISTILLED]:
            name = f"student {kind}, seed {seed}"
            jobs.append(PlannedJob("train-student", name, kind, student.train.epochs, number))
    for number, seed in enumerate(student.seeds if student.export else (), 1):
        for kind, (train, _) in fine_tunings(recipe.compress).items():
            name = f"{network_name(kind, prunes=recipe.compress.prunes)}, seed {seed}"
            jobs.append(PlannedJob("compress", name, kind, train.epochs, number))
        jobs.append(PlannedJob("compress", export_name(seed), "export", 1.0, number))
    return [job for job in jobs if job.stage in stages]
