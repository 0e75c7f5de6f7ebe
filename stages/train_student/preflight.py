"""Build the losses on the networks before anything is trained or cached, so that errors are raised early."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.classifier_reuse import add_projector
from kdpipe.stages.distillation.compatibility import check_image_size, check_labels, require_no_logits
from kdpipe.stages.distillation.embedding_student import check_output
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes
from kdpipe.stages.losses.user_loss import try_loss
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.models.tokens import is_headless
from kdpipe.stages.targets.ensemble import check_teachers
from kdpipe.stages.targets.feature_spec import source_shapes, statistic_shape


def dry_run_losses(
    losses: Sequence[Loss],
    student: StudentConfig,
    teacher: nn.Module,
    context: StageContext,
    *,
    where: str = "distill",
) -> None:
    """Build each loss for the untrained student and the teacher.

    Args:
        losses: The losses' configurations.
        student: The recipe's `student` section.
        teacher: The teacher, trained or not.
        context: The data and views of the run.
        where: The recipe key of the losses, for error messages.

    Raises:
        RecipeError: A loss cannot be built; the message names the entry, and the network of the layer.
    """
    num_stores = max(1, len(student.stores))
    check_teachers(student.teachers, num_stores)
    check_image_size(losses, student, context, where)
    if is_headless(teacher):
        require_no_logits(losses, 0, where)
    check_labels(losses, student.teachers, context.train_set, where)
    if num_stores == 1 and losses:
        check_output(student, losses, context, of_embeddings=is_headless(teacher))
    if losses and student.heads.layers:
        own, num_classes = build_student(student, student.seeds[0], context).model, context.train_set.num_classes
        student.heads.check(own, context.resized(student.image_size).image_shape, num_classes)
    model: nn.Module | None = None
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if (loss.store or 0) >= num_stores:
            raise RecipeError(f"{entry} uses store {loss.store}, but there are {num_stores}, counted from 0.")
        try:
            model = model or _student(losses, student, teacher, context)
            shapes = feature_shapes(model, student_layers([loss]), context.resized(student.image_size).image_shape)
        except ModelError as error:
            raise RecipeError(f"{entry}, the student: {error}") from error
        except RecipeError as error:  # the projector does not fit
            raise RecipeError(f"{entry}: {error}") from error
        if loss.target == "student":
            _build(loss, shapes, model, context.resized(student.image_size), entry=entry)
        elif (loss.store or 0) == 0:  # the teachers of other stores are not available
            _build(loss, shapes, teacher, context, entry=entry)


def _student(losses: Sequence[Loss], student: StudentConfig, teacher: nn.Module, context: StageContext) -> nn.Module:
    """Build the untrained student, with the modules that `losses` add to it."""
    model = build_student(student, student.seeds[0], context).model
    for loss in losses:
        if isinstance(loss, SimKD) and not loss.store:
            image_shape = context.resized(student.image_size).image_shape
            classes, columns = _head_shape(teacher, context)
            add_projector(model, loss, image_shape, num_features=columns - 1, num_classes=classes)
    return model


def _head_shape(teacher: nn.Module, context: StageContext) -> tuple[int, int]:
    """Return (C, D + 1) of the teacher's head. Raises RecipeError if it has none that can be stored."""
    try:
        head = linear_head(teacher, context.image_shape)
    except ModelError as error:
        raise RecipeError(str(error)) from error
    return head.shape[0], head.shape[1]


def _build(loss: Loss, shapes: Shapes, teacher: nn.Module, context: StageContext, *, entry: str) -> None:
    features, num_classes = loss.required_features(shapes), context.train_set.num_classes
    try:
        sources = source_shapes(teacher, features, context.image_shape)
        stored = {
            feature: _head_shape(teacher, context)
            if feature.is_head
            else statistic_shape(feature.for_shape(sources[feature.source]), sources[feature.source])
            for feature in features
        }
    except ModelError as error:
        raise RecipeError(f"{entry}, the teacher: {error}") from error
    try:
        loss.require_classes(num_classes)
        module = loss.build(shapes, stored, DatasetInfo(2, num_classes))
        try_loss(loss, module, shapes, stored, num_classes)
    except RecipeError as error:
        raise RecipeError(f"{entry}: {error}") from error
