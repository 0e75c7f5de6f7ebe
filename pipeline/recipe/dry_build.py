"""Build a recipe's networks, layers and losses on blank images of the data's shape, without reading the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kdpipe.pipeline.recipe.load import Recipe, fault_of, faults_of_each, students_of
from kdpipe.stages.cache_teacher.plan import encoding_of
from kdpipe.stages.compress.compress import dry_run
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import UNLABELED, ImageSet
from kdpipe.stages.data.load import list_source, require_applicable
from kdpipe.stages.data.names import FILE_KINDS, KINDS, NUM_CLASSES, SHAPES
from kdpipe.stages.data.sources.user_function import is_user_dataset
from kdpipe.stages.distillation.compatibility import require_fitting_encoding
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import DataError, ModelError, NotLogitsError, RecipeError, UnknownModelError
from kdpipe.stages.given_teacher import require_given
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.build import PUBLISHED, build_model, weights_path
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.classes import read_class_list
from kdpipe.stages.models.normalization import IMAGENET, Normalization
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS
from kdpipe.stages.models.user_models import is_user_model
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import parse_feature, source_shapes
from kdpipe.stages.teacher import TeacherConfig, require_weights, untrained_teacher
from kdpipe.stages.train_student.preflight import dry_run_losses
from kdpipe.stages.training.preflight import try_network
from kdpipe.stages.zero_shot import class_names_of

Config = TypeVar("Config", TeacherConfig, StudentConfig)

SIDES = (256, 320)
"""Assumed sides of photographs: views that give both the same size give all photographs that size."""


def dry_build(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Build the networks, hook the layers, build the losses and compress an untrained student, as a run does first.

    Weights are ignored: they may have to be downloaded, or be on another machine.

    Returns:
        What stops a run, and notes on what could not be tried.
    """
    given = recipe.teacher
    recipe = replace(recipe, teacher=without_weights(recipe.teacher), student=without_weights(recipe.student))
    recipe = replace(recipe, compress=replace(recipe.compress, student=None))
    try:
        context = blank_context(recipe)
    except (RecipeError, DataError) as error:
        return [str(error)], []
    if context is None:
        note = f"only names are checked: the size of the images is unknown until {recipe.data.name} is read."
        return list(_faults_of_names(recipe)), [note, *_missing_data(recipe.data)]
    faults = list(dict.fromkeys(_faults(recipe, context)))
    if not faults and is_user_model(given.model.name):
        fault = fault_of(require_weights, given, recipe.seed, context)
        faults += [fault] if fault else []
    return faults, _missing_data(recipe.data)


def _missing_data(config: DataConfig) -> list[str]:
    """Return a note if the recipe's folder or file of data is not there: the recipe may be for another machine."""
    kind, _, argument = config.name.partition(":")
    place = Path(config.root).expanduser() / Path(argument).expanduser()
    if kind not in ("imagefolder", "table", "lmdb", "npz") or place.exists():
        return []
    return [f"the data is not checked: {place.absolute()} is not on this machine."]


def faults_of_given(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return faults and notes on a teacher whose weights are taken as they are, as far as they show without data.

    What `dry_build` and `validate` refuse is left out.
    """
    teacher, model = recipe.teacher, recipe.teacher.model
    is_own, is_published = is_user_model(model.name), model.weights == PUBLISHED
    if teacher.train is not None or (model.weights is None and not is_own):
        return [], []
    if is_published and (is_own or model.name in SMALL_IMAGE_NETWORKS or recipe.data.name not in SHAPES):
        return [], []  # there are none, or only the data has the number of classes
    try:
        if teacher.mean is None and model.weights and not is_published and not weights_path(model.weights).is_file():
            return [], [f"the teacher's input scaling is not checked: {model.weights} is not on this machine."]
        channels = recipe.data.channels or SHAPES.get(recipe.data.name, (0, 3, 0))[1] or 3
        context = blank_context(recipe) or _blank(recipe, NUM_CLASSES, channels, SIDES[0])
        network: nn.Module = nn.Identity()
        if is_own:
            given = replace(model, weights=None)
            network = context.build_model(given, recipe.seed, headless=not teacher.has_own_head)
        scaling = Normalization(teacher.mean, teacher.std) if teacher.mean and teacher.std else IMAGENET
        fault = fault_of(require_given, teacher, ModelBundle(network, {}, scaling), context)
    except (ModelError, RecipeError, DataError):
        return [], []
    return [fault] if fault else [], []


def blank_context(recipe: Recipe) -> StageContext | None:
    """Return blank images in the shape of the recipe's data and views; None if only the data has their size.

    Raises:
        RecipeError: The data set is unknown, or the views cannot be applied to its images.
    """
    data = recipe.data
    kind = data.name.partition(":")[0]
    unknown = kind not in KINDS and not is_user_dataset(data.name)
    require_applicable(data)
    if unknown:
        list_source(data, "train", None)  # raises before it reads anything
    num_classes, channels, side = SHAPES.get(data.name, (NUM_CLASSES, 3 if kind in FILE_KINDS else None, None))
    channels, side = data.channels or channels, data.image_size or side
    if channels is None:
        return None
    if side is None:
        shapes = [_blank(recipe, num_classes, channels, size).image_shape for size in SIDES]
        if shapes[0] != shapes[1]:
            return None
    context = _blank(recipe, num_classes, channels, side or SIDES[0])
    assert context.image_shape  # raises if the views cannot be applied
    return context


def _blank(recipe: Recipe, num_classes: int, channels: int, side: int) -> StageContext:
    """Return a white and a black image of each class: the std of equal images would be 0."""
    names = tuple(str(number) for number in range(num_classes))
    if recipe.teacher.model.classes is not None:
        names = tuple(each[0] for each in read_class_list(recipe.teacher.model))[:num_classes]
    elif recipe.teacher.class_embeddings is not None:
        names = tuple(each[0] for each in class_names_of(recipe.teacher.class_embeddings))[:num_classes]
    num_classes = len(names)
    num_images = 2 * num_classes
    images = torch.zeros(num_images, channels, side, side, dtype=torch.uint8)
    images[num_classes:] = 255
    ids = torch.arange(num_images)
    labels = torch.full_like(ids, UNLABELED) if recipe.data.labels == "none" else ids % num_classes
    blank = ImageSet(recipe.data.name, "train", images, labels, ids, names)
    return StageContext(Path(), blank, blank, recipe.views, torch.device("cpu"), RunMonitor())


def _faults(recipe: Recipe, context: StageContext) -> Iterator[str]:
    """Yield what a run would refuse before it trains: teacher, student, cache, losses and compression."""
    teacher = _built(untrained_teacher, recipe.teacher, recipe.seed, context)
    student = _built(build_student, recipe.student, recipe.student.seeds[0], context)
    runs = {}
    for role, built in (("teacher", teacher), ("student", student)):
        fault = built if isinstance(built, str) else fault_of(_try, recipe, role, built, context)
        yield from [f"{role}: {fault}"] if fault else []
        runs[role] = fault is None
    if isinstance(teacher, ModelBundle):
        yield from _faults_of_cache(recipe, teacher, context)
    if isinstance(teacher, ModelBundle) and isinstance(student, ModelBundle):
        yield from _faults_of_losses(recipe, teacher, context)
    if runs["student"] and recipe.compress.steps and recipe.student.export:
        compress = partial(dry_run, exports=_tries_export(recipe))
        fault = fault_of(compress, recipe.compress, recipe.student, recipe.distill, context)
        yield from [f"compress: {fault}"] if fault else []


def _try(recipe: Recipe, role: str, network: ModelBundle, context: StageContext) -> None:
    train = recipe.teacher.train if role == "teacher" else recipe.student.train
    exports = role == "student" and _tries_export(recipe)
    try_network(network, train, role=role, device=context.device, exports=exports)


def _tries_export(recipe: Recipe) -> bool:
    """Return whether an export could fail; that of kdpipe's own networks does not, and takes most of the time."""
    is_own = recipe.student.model.name in SMALL_IMAGE_NETWORKS and recipe.compress.opset is None
    return recipe.student.export and not is_own


def _built(build: Callable[..., ModelBundle], *arguments: Any) -> ModelBundle | str:
    """Return the network, or the reason why it cannot be built."""
    try:
        return build(*arguments)
    except (ModelError, RecipeError) as error:
        return str(error)


def _faults_of_cache(recipe: Recipe, teacher: ModelBundle, context: StageContext) -> Iterator[str]:
    for number, text in enumerate(recipe.cache.layers):
        try:
            source_shapes(teacher.model, [parse_feature(text)], context.image_shape)
        except (ModelError, RecipeError) as error:
            yield f"cache.layers.{number}: {error}"
    if recipe.data.name in SHAPES:  # the number of classes is known
        fault = fault_of(encoding_of, recipe.cache, context, teacher)
        yield from [fault] if fault else []


def _faults_of_losses(recipe: Recipe, teacher: ModelBundle, context: StageContext) -> Iterator[str]:
    known = recipe.data.name in SHAPES and fault_of(encoding_of, recipe.cache, context, teacher) is None
    encoding = encoding_of(recipe.cache, context, teacher) if known and not recipe.student.stores else None
    for where, (student, losses) in students_of(recipe).items():

        def try_losses(some: Sequence[Loss], student: StudentConfig = student, where: str = where) -> None:
            dry_run_losses(some, student, teacher.model, context, where=where)

        alone = list(faults_of_each(losses, where, try_losses))
        together = None if alone else fault_of(try_losses, losses)
        together = together or fault_of(require_fitting_encoding, encoding, losses, student.teachers, where)
        yield from [*alone, together] if together else alone


def _faults_of_names(recipe: Recipe) -> Iterator[str]:
    """Yield networks and arguments that do not exist, whatever the size of the images."""
    channels, side = recipe.data.channels or 3, recipe.data.image_size or SIDES[0]
    for role, config in (("teacher", recipe.teacher.model), ("student", recipe.student.model)):
        try:
            shape: Any = {"num_classes": NUM_CLASSES, "in_channels": channels, "image_size": (side, side)}
            build_model(config, **shape, seed=0, task=recipe.data.task)
        except (UnknownModelError, NotLogitsError) as error:
            yield f"{role}: {error}"
        except ModelError:  # it does not fit images of the assumed size
            continue


def without_weights(section: Config) -> Config:
    """Return the section without weights; a small network keeps `published`, which it does not have, to be refused."""
    model = section.model
    if model.weights == PUBLISHED and model.name in SMALL_IMAGE_NETWORKS:
        return section
    classes = model.classes if is_user_model(model.name) else None
    return replace(section, model=replace(model, weights=None, classes=classes))
