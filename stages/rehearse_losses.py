"""Losses tried on networks before anything is trained or cached: what cannot be taught is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stages.errors import ModelError, RecipeError
from stages.features import feature_shapes
from stages.forms import form_shape
from stages.losses.entry import Entry
from stages.losses.said import Facts, Shapes
from stages.losses.simkd import SimKDConfig
from stages.reuse_classifier import linear_of, with_projector
from stages.setup import Setup
from stages.store_plan import source_shapes
from stages.teachers import check_teachers
from stages.train_student import StudentConfig, fresh_student


def rehearse_losses(
    losses: Sequence[Entry], student: StudentConfig, teacher: nn.Module, setup: Setup, *, where: str = "distill"
) -> None:
    """Raise RecipeError, naming the entry of `where` and whose layer it is, for losses by which student and teacher,
    trained or not, cannot be joined.
    """
    num_stores = max(1, len(student.stores))
    check_teachers(student.teachers, num_stores)
    model: nn.Module | None = None
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if (loss.store or 0) >= num_stores:
            raise RecipeError(f"{entry} names store {loss.store}; there are {num_stores}, counted from 0.")
        try:
            model = model or _student(losses, student, teacher, setup)
            shapes = feature_shapes(model, loss.student_layers(), setup.image_shape)
        except ModelError as error:
            raise RecipeError(f"{entry}, the student: {error}") from error
        except RecipeError as error:  # a projector that fits nowhere
            raise RecipeError(f"{entry}: {error}") from error
        if (loss.store or 0) == 0:  # else it is another teacher's, which is not here
            _build(loss, shapes, teacher, setup, entry=entry)


def _student(losses: Sequence[Entry], student: StudentConfig, teacher: nn.Module, setup: Setup) -> nn.Module:
    """The untrained student with what any of `losses` makes part of it."""
    model = fresh_student(student, student.seeds[0], setup).model
    for loss in losses:
        if isinstance(loss, SimKDConfig) and loss.teacher is None:
            classifier = linear_of(teacher, loss.classifier[1])
            features, classes = classifier.in_features, classifier.out_features
            with_projector(model, loss, setup.image_shape, num_features=features, num_classes=classes)
    return model


def _build(loss: Entry, shapes: Shapes, teacher: nn.Module, setup: Setup, *, entry: str) -> None:
    wanted = loss.wants(shapes)
    try:
        given = source_shapes(teacher, wanted, setup.image_shape)
        stored = {one: form_shape(one.fitted(given[one.source]), given[one.source]) for one in wanted}
    except ModelError as error:
        raise RecipeError(f"{entry}, the teacher: {error}") from error
    try:
        loss.build(shapes, stored, Facts(2, setup.train_set.num_classes))
    except RecipeError as error:
        raise RecipeError(f"{entry}: {error}") from error
