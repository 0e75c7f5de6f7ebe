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
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if (loss.store or 0) >= num_stores:
            raise RecipeError(f"{entry} names store {loss.store}; there are {num_stores}, counted from 0.")
        shapes = student_side(losses, loss, student, teacher, setup, entry=entry)
        if (loss.store or 0) > 0:
            continue  # another teacher, which is not here
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


def student_side(
    losses: Sequence[Entry], loss: Entry, student: StudentConfig, teacher: nn.Module, setup: Setup, *, entry: str
) -> Shapes:
    """The shapes of what `loss` hooks in the student, with what any of `losses` makes part of it."""
    model = fresh_student(student, student.seeds[0], setup).model
    try:
        for other in losses:
            if isinstance(other, SimKDConfig) and other.teacher is None:
                classifier = linear_of(teacher, other.classifier[1])
                with_projector(
                    model,
                    other,
                    setup.image_shape,
                    num_features=classifier.in_features,
                    num_classes=classifier.out_features,
                )
        return feature_shapes(model, loss.student_layers(), setup.image_shape)
    except ModelError as error:
        raise RecipeError(f"{entry}, the student: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{entry}: {error}") from error
