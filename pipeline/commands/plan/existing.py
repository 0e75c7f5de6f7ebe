"""Find what a run needs not make again: the finished networks and stores of its folder and its workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kdpipe.pipeline.run import Run
from kdpipe.stages.compress.compress import compressed_root, fine_tunings
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, student_folder
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.train_student.student import student_fingerprint
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.shared_job import offered
from kdpipe.store import KdpipeError, is_url


def find_students(run: Run, store: Path) -> dict[tuple[str, int], Path]:
    """Return the run folder of each finished student, by kind and seed.

    Args:
        run: The run.
        store: Its store, or that of another run which it would use.
    """
    config, context = run.recipe.student, run.context
    spec = open_stores(run, store)
    specs = {**({ALONE: None} if config.baseline else {}), **({DISTILLED: spec} if run.recipe.distill else {})}
    found: dict[tuple[str, int], Path] = {}
    for kind, losses in specs.items():
        for seed in config.seeds:
            job_dir, where = student_folder(run.folder, kind, seed), None
            if job_dir.result() is not None:
                where = run.folder
            elif kind == ALONE or losses is not None:
                student = build_student(config, seed, context, losses)
                where = offered(job_dir, student_fingerprint(config, seed, losses, student, context), context)
            if where is not None:
                found[kind, seed] = where
    return found


def open_stores(run: Run, store: Path, losses: Sequence[Loss] = ()) -> DistillationSpec | None:
    """Return the losses, the recipe's by default, on a run's stores, `store` in place of its own.

    None if they are not complete.
    """
    losses = losses or run.recipe.distill
    places = [store if place == run.store else place for place in run.stores]
    if not losses or any(is_url(place) or not Path(place).exists() for place in places):
        return None
    with suppress(KdpipeError):
        return open_distillation(places, losses, run.recipe.student, {}, run.context)
    return None


def unfinished_compressions(run: Run) -> Iterator[tuple[str, int]]:
    """Yield kind and seed of each network that `kdpipe compress` has still to make."""
    root = compressed_root(run.folder, run.recipe.compress)
    for kind in fine_tunings(run.recipe.compress):
        for seed in run.recipe.student.seeds:
            if JobDir(root / f"{kind}-seed{seed}").result() is None:
                yield kind, seed
