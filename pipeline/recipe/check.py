"""`kdpipe recipe check`: all that can be known of a recipe without data, GPU or network, and every fault at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.layers import read_layers
from pipeline.recipe.load import Recipe, examine_layers
from pipeline.recipe.rehearsal import rehearse_recipe
from pipeline.recipe.sentence import one_line
from stages.errors import RecipeError
from stages.models.build import PUBLISHED
from stages.optim import TrainConfig
from store import is_url


@dataclass(frozen=True)
class Checked:
    """What is to be said of a recipe. does: a line on what it would do, where it can be read.

    faults: what stops `kdpipe run`. notes: what does not, but is likely not meant, or not here yet.
    """

    path: str
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()
    does: str | None = None

    @property
    def fine(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        faults, notes = list(self.faults), list(self.notes)
        return {"recipe": self.path, "fine": self.fine, "does": self.does, "faults": faults, "notes": notes}


def check_recipe(path: Path, overrides: Iterable[str], environ: Mapping[str, str]) -> Checked:
    """Everything that can be said of the recipe at `path`; nothing is raised for what is wrong with it."""
    try:
        layers = read_layers(path, overrides, environ)
    except RecipeError as error:
        return Checked(str(path), (str(error),))
    recipe, faults = examine_layers(layers)
    if recipe is None:
        return Checked(str(path), tuple(faults))
    tried = rehearse_recipe(recipe)
    faults += [one_line(f"{path}: {fault}") for fault in (*_unanswered(recipe), *tried.faults)]
    notes = [one_line(f"{path}: {note}") for note in (*tried.notes, *_idle_keys(recipe), *_absent_files(recipe))]
    return Checked(str(path), tuple(dict.fromkeys(faults)), tuple(notes), _does(recipe))


def print_checked(checked: Checked) -> None:
    """For people, on stdout."""
    if checked.fine:
        print(f"{one_line(checked.path)}: fine: {checked.does}")  # noqa: T201
    for fault in checked.faults:
        print(fault)  # noqa: T201
    for note in checked.notes:
        print(f"  note: {note}")  # noqa: T201


def _unanswered(recipe: Recipe) -> Iterator[str]:
    """What `kdpipe run` refuses before it looks at data."""
    if recipe.teacher.train is None and recipe.teacher.model.weights is None:
        yield "the teacher has neither [teacher.train] nor teacher.model.weights: give one of them."
    if not recipe.distill and not recipe.compare:
        yield "there is no [[distill]], and nothing to [compare]: add a loss (`kdpipe losses` lists them)."
    if recipe.cache.store and is_url(recipe.cache.store):
        yield f"cache.store = {recipe.cache.store!r}: the teacher's words are written to a folder; copy that elsewhere."
    if recipe.student.model.weights == PUBLISHED and recipe.student.train.epochs == 0:
        yield "student.train.epochs = 0: a student that is not trained learns nothing of the teacher."


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Keys that were given and do nothing as the others stand."""
    trainings = {
        "teacher.train": recipe.teacher.train,
        "student.train": recipe.student.train,
        "compress.prune_train": recipe.compress.prune_train if recipe.compress.prunes else None,
        "compress.quantize_train": recipe.compress.quantize_train if recipe.compress.quantizes else None,
    }
    for where, train in trainings.items():
        yield from _idle_in_training(where, train) if train is not None else ()
    if recipe.views.augments and recipe.views.num_views == 1:
        yield "views.num_views = 1: every epoch shows the same augmented pictures."
    if recipe.student.teachers.temperatures and not recipe.distill:
        yield "student.teachers.temperatures: there is no loss that goes by them."


def _idle_in_training(where: str, train: TrainConfig) -> Iterator[str]:
    if train.milestones and train.schedule != "step":
        yield f"{where}.milestones do nothing with schedule = {train.schedule!r}."
    if train.schedule == "step" and not train.milestones:
        yield f"{where}.schedule = 'step' without milestones keeps the learning rate as it is."
    late = [milestone for milestone in train.milestones if milestone >= train.epochs]
    if train.schedule == "step" and late:
        yield f"{where}.milestones: {late[0]} is not reached in {train.epochs} epochs."
    if train.warmup_epochs >= train.epochs > 0:
        yield f"{where}.warmup_epochs = {train.warmup_epochs:g}: the {train.epochs} epochs are all warm-up."
    if train.nesterov and (train.optimizer != "sgd" or train.momentum == 0):
        yield f"{where}.nesterov is for optimizer = 'sgd' with momentum."


def _absent_files(recipe: Recipe) -> Iterator[str]:
    """Files and stores that the recipe names and that are not on this machine, or not yet."""
    named = {
        "teacher.model.weights": recipe.teacher.model.weights,
        "student.model.weights": recipe.student.model.weights,
        "compress.student": recipe.compress.student,
        **{f"student.stores.{number}": store for number, store in enumerate(recipe.student.stores)},
    }
    for key, place in named.items():
        if place is None or place == PUBLISHED or is_url(place):
            continue
        try:
            absent = not Path(place).expanduser().exists()
        except (OSError, RuntimeError, ValueError):  # no such home folder; a name that no file can have
            absent = True
        if absent:
            yield f"{key} = {place!r} is not on this machine, or not yet."


def _does(recipe: Recipe) -> str:
    """One line on what the recipe would do."""
    teacher, student, compress = recipe.teacher, recipe.student, recipe.compress
    trained = f"trained for {teacher.train.epochs} epochs" if teacher.train else "as it is"
    seeds = f"{len(student.seeds)} seed{'s' if len(student.seeds) > 1 else ''}"
    losses = " + ".join(loss.loss for loss in recipe.distill) or "nothing"
    parts = [
        f"{recipe.data.name}; teacher {teacher.model.name}, {trained}",
        f"{recipe.views.num_views} views",
        f"student {student.model.name}, {student.train.epochs} epochs with {losses}, {seeds}",
    ]
    if recipe.compare:
        parts.append(f"compared: {', '.join(recipe.compare)}")
    parts.append(" and ".join(compress.steps) if compress.steps else "no compression")
    return "; ".join(parts)
