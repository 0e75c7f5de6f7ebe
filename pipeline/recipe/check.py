"""Check recipes for `kdpipe recipe check`: find every fault that shows without data, GPU or network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.callbacks.registry import callback_faults
from kdpipe.pipeline.recipe.dry_build import dry_build, faults_of_given
from kdpipe.pipeline.recipe.load import Recipe, faults_of_trainings, trainings_of, validate
from kdpipe.pipeline.recipe.messages import one_line
from kdpipe.pipeline.recipe.overrides import read_with_overrides
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.build import PUBLISHED
from kdpipe.stages.models.user_models import is_user_model
from kdpipe.stages.training.optim import idle_keys
from kdpipe.store import is_url


@dataclass(frozen=True)
class Checked:
    """The result of checking a recipe.

    Attributes:
        faults: What `kdpipe run` would refuse.
        notes: What is probably a mistake, or not on this machine yet.
    """

    recipe: str
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fine": self.ok}


def check_recipe(path: Path, overrides: Iterable[str], environ: Mapping[str, str]) -> Checked:
    """Check the recipe at `path`; faults are returned, not raised."""
    try:
        source = read_with_overrides(path, overrides, environ)
    except RecipeError as error:
        return Checked(str(path), (str(error),))
    recipe, faults = validate(source)
    if recipe is None:
        return Checked(str(path), tuple(faults))
    both = zip(dry_build(recipe), faults_of_given(recipe), strict=True)
    build_faults, build_notes = ([*one, *other] for one, other in both)
    of_trainings = list(faults_of_trainings(recipe, imports=True))
    faults += [one_line(f"{path}: {fault}") for fault in (*_incomplete(recipe), *of_trainings, *build_faults)]
    idle = () if of_trainings else _idle_keys(recipe)
    notes = [one_line(f"{path}: {note}") for note in (*build_notes, *idle, *_absent_files(recipe))]
    return Checked(str(path), tuple(dict.fromkeys(faults)), tuple(notes))


def print_checked(checked: Checked) -> None:
    """Print the result as text."""
    if checked.ok:
        print(f"{one_line(checked.recipe)}: fine")  # noqa: T201
    for line in (*checked.faults, *(f"  note: {note}" for note in checked.notes)):
        print(line)  # noqa: T201


def _incomplete(recipe: Recipe) -> Iterator[str]:
    """Yield what `kdpipe run` refuses before it reads data."""
    model = recipe.teacher.model
    if recipe.teacher.train is None and model.weights is None and not is_user_model(model.name):
        yield "the teacher has neither [teacher.train] nor teacher.model.weights: add one of them."
    if not recipe.distill and not recipe.compare and not recipe.cohort:
        yield "there is neither [[distill]] nor [compare] nor [cohort]: add a loss (`kdpipe losses` lists them)."
    if recipe.cache.store and is_url(recipe.cache.store):
        yield f"cache.store = {recipe.cache.store!r}: stores are written to a local folder; upload it afterwards."
    yield from callback_faults(recipe.callbacks)
    if recipe.student.model.weights == PUBLISHED and recipe.student.train.epochs == 0:
        yield "student.train.epochs = 0: the student would not be trained at all."


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Yield notes about optimizers and schedules with keys that have no effect."""
    for key, train in trainings_of(recipe).items():
        for idle, why in idle_keys(train):
            yield f"{key}.{idle} is without effect: {why}."
        if train.schedule == "step" and not train.milestones:
            yield f"{key}.schedule = 'step' without milestones keeps the learning rate constant."
        if train.warmup_epochs >= train.epochs > 0:
            yield f"{key}.warmup_epochs = {train.warmup_epochs:g}: all {train.epochs} epochs are warm-up."


def _absent_files(recipe: Recipe) -> Iterator[str]:
    """Yield notes about files and stores that are not on this machine."""
    named = {
        "teacher.model.weights": recipe.teacher.model.weights,
        "student.model.weights": recipe.student.model.weights,
        "compress.student": recipe.compress.student,
        **{f"student.stores.{number}": store for number, store in enumerate(recipe.student.stores)},
    }
    for key, path in named.items():
        if path is None or path == PUBLISHED or is_url(path):
            continue
        with suppress(OSError, RuntimeError, ValueError):  # an unknown home folder, or an impossible name
            if Path(path).expanduser().exists():
                continue
        yield f"{key} = {path!r} does not exist on this machine."
