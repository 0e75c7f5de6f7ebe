"""A recipe's networks, layers and losses, tried on blank images in the shape of its data, which is not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.recipe.load import Recipe, all_losses, fault_of, faults_of_each
from stages.compress import rehearse
from stages.datasets.image_set import ImageSet
from stages.datasets.sources import KNOWN_NAMES, list_source
from stages.errors import DataError, ModelError, RecipeError, UnknownModelError
from stages.forms import parse_wanted
from stages.losses.entry import Entry
from stages.models.build import PUBLISHED, build_model
from stages.models.small_images import SMALL_IMAGE_NETWORKS
from stages.network import Network
from stages.rehearse_losses import rehearse_losses
from stages.setup import Setup
from stages.store_plan import source_shapes
from stages.train_student import StudentConfig, fresh_student
from stages.train_teacher import TeacherConfig, untrained_teacher
from stages.watch import Watch

Config = TypeVar("Config", TeacherConfig, StudentConfig)

SHAPES: dict[str, tuple[int, int | None, int | None]] = {
    "digits": (10, 1, 8),
    "MNIST": (10, 1, 28),
    "FashionMNIST": (10, 1, 28),
    "CIFAR10": (10, 3, 32),
    "CIFAR100": (100, 3, 32),
}
"""Classes, channels and side of the data sets that have names."""

KINDS = {name.partition(":")[0] for name in KNOWN_NAMES}

NUM_CLASSES = 10
"""Stands in where only the data says it; no network and no loss is refused for it."""

SIDES = (256, 320)
"""Stand in for the sides of photographs: views that make one size of these make it of all."""


@dataclass(frozen=True)
class Rehearsed:
    """What was found: what stops a run, and what could not be tried."""

    faults: tuple[str, ...]
    notes: tuple[str, ...]


def rehearse_recipe(recipe: Recipe) -> Rehearsed:
    """Build the networks, hook the layers, join the losses and compress an untrained student, as a run does before it
    trains. Weights are not looked for: they are downloaded, or another machine's.
    """
    recipe = replace(recipe, teacher=_unweighted(recipe.teacher), student=_unweighted(recipe.student))
    recipe = replace(recipe, compress=replace(recipe.compress, student=None))
    try:
        setup = stand_in(recipe)
    except (RecipeError, DataError) as error:
        return Rehearsed((str(error),), ())
    if setup is None:
        note = f"only names are checked: of what size the images are is known when {recipe.data.name} is there."
        return Rehearsed(tuple(_faults_of_names(recipe)), (note,))
    return Rehearsed(tuple(dict.fromkeys(_faults(recipe, setup))), ())


def stand_in(recipe: Recipe) -> Setup | None:
    """Blank images as the recipe's data and views make them; None where only the data can tell their size.

    Raises RecipeError for an unknown data set, and for views that cannot be of such images.
    """
    data = recipe.data
    kind = data.name.partition(":")[0]
    if kind not in KINDS or (kind != "imagefolder" and data.test_crop != 1):
        list_source(data, "train", None)  # refuses either, before it looks for anything
    num_classes, channels, side = SHAPES.get(data.name, (NUM_CLASSES, 3 if kind == "imagefolder" else None, None))
    channels, side = data.channels or channels, data.image_size or side
    if channels is None:
        return None
    if side is None:
        shapes = [_blank(recipe, num_classes, channels, each).image_shape for each in SIDES]
        if shapes[0] != shapes[1]:
            return None
    setup = _blank(recipe, num_classes, channels, side or SIDES[0])
    assert setup.image_shape  # the getting of which refuses views that cannot be
    return setup


def _blank(recipe: Recipe, num_classes: int, channels: int, side: int) -> Setup:
    """Two images of each class, a white and a black one: the std of all alike would be 0."""
    num_images = 2 * num_classes
    images = torch.zeros(num_images, channels, side, side, dtype=torch.uint8)
    images[num_classes:] = 255
    names = tuple(str(number) for number in range(num_classes))
    ids = torch.arange(num_images)
    blank = ImageSet(recipe.data.name, "train", images, ids % num_classes, ids, names)
    return Setup(Path(), blank, blank, recipe.views, torch.device("cpu"), Watch())


def _faults(recipe: Recipe, setup: Setup) -> Iterator[str]:
    """What a run would refuse before it trains: of the teacher, the student, what joins them, and compression."""
    teacher = _built(untrained_teacher, recipe.teacher, recipe.seed, setup)
    student = _built(fresh_student, recipe.student, recipe.student.seeds[0], setup)
    for role, built in (("teacher", teacher), ("student", student)):
        if isinstance(built, str):
            yield f"{role}: {built}"
    if isinstance(teacher, Network):
        yield from _faults_of_cache(recipe, teacher, setup)
    if isinstance(teacher, Network) and isinstance(student, Network):
        yield from _faults_of_losses(recipe, teacher, setup)
    if isinstance(student, Network) and recipe.compress.steps:
        fault = fault_of(rehearse, recipe.compress, recipe.student, setup)
        yield from [f"compress: {fault}"] if fault else []


def _built(build: Callable[..., Network], *what: Any) -> Network | str:
    """A network, or why there is none."""
    try:
        return build(*what)
    except (ModelError, RecipeError) as error:
        return str(error)


def _faults_of_cache(recipe: Recipe, teacher: Network, setup: Setup) -> Iterator[str]:
    for number, text in enumerate(recipe.cache.layers):
        try:
            source_shapes(teacher.model, [parse_wanted(text)], setup.image_shape)
        except (ModelError, RecipeError) as error:
            yield f"cache.layers.{number}: {error}"


def _faults_of_losses(recipe: Recipe, teacher: Network, setup: Setup) -> Iterator[str]:
    for where, losses in all_losses(recipe).items():

        def try_losses(some: Sequence[Entry], where: str = where) -> None:
            rehearse_losses(some, recipe.student, teacher.model, setup, where=where)

        alone = list(faults_of_each(losses, where, try_losses))
        together = None if alone else fault_of(try_losses, losses)
        yield from [*alone, together] if together else alone


def _faults_of_names(recipe: Recipe) -> Iterator[str]:
    """Networks and arguments that do not exist, for images of whatever size."""
    channels, side = recipe.data.channels or 3, recipe.data.image_size or SIDES[0]
    for role, config in (("teacher", recipe.teacher.model), ("student", recipe.student.model)):
        try:
            build_model(config, num_classes=NUM_CLASSES, in_channels=channels, image_size=(side, side), seed=0)
        except UnknownModelError as error:
            yield f"{role}: {error}"
        except ModelError:  # it does not fit images of that size, which nobody has asked for
            continue


def _unweighted(section: Config) -> Config:
    """The section with a network that is built without its weights. Small networks have no published ones: they stay
    asked for, to be refused.
    """
    model = section.model
    if model.weights == PUBLISHED and model.name in SMALL_IMAGE_NETWORKS:
        return section
    return replace(section, model=replace(model, weights=None))
