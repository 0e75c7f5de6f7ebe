"""Open and check the stores that a student is distilled from, and the losses that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.compatibility import (
    check_hard_label_views,
    check_image_size,
    check_labels,
    check_losses,
    class_warnings,
    require_logits,
    require_views,
    temperatures_of,
)
from kdpipe.stages.distillation.embedding_student import check_output
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import student_shapes
from kdpipe.stages.distillation.teacher_accuracy import deciding_accuracies
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.targets.ensemble import check_teachers
from kdpipe.stages.targets.open import local_store_path, open_with_views
from kdpipe.stages.targets.tail_mass import measure_tails, report_tail, tail_of

if TYPE_CHECKING:
    from kdpipe.stages.distillation.student_config import StudentConfig


def open_distillation(
    places: Sequence[Path | str],
    losses: Sequence[Loss],
    student: StudentConfig,
    identity: Mapping[str, Any],
    context: StageContext,
) -> DistillationSpec:
    """Open and check the stores that `losses` learn from.

    Stores at URLs, and archives, are staged first: copied to this machine and unpacked, once for all its jobs.

    Args:
        places: Paths or URLs of the stores.
        losses: The losses' configurations.
        student: The recipe's `student` section.
        identity: What the stores' manifests must contain, besides the views, by section.
        context: The data and views of the run.

    Raises:
        RecipeError: A loss names a store that does not exist, or requires something that no store can provide.
        StoreError: A store is incomplete, or lacks something.
        FingerprintMismatch: A store belongs to another teacher or other views.
    """
    check_losses(losses, context.views, student.teachers)
    check_hard_label_views(student.hard_label_views, context.views)
    check_teachers(student.teachers, len(places))
    check_image_size(losses, student, context)
    check_labels(losses, student.teachers, context.train_set)
    for number, loss in enumerate(losses):
        if (loss.store or 0) >= len(places):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) uses store {loss.store}, but there are {len(places)}, counted from 0."
            )
        loss.require_classes(context.train_set.num_classes)
    for warning in class_warnings(losses, context.train_set.num_classes):
        context.monitor.warn_once("train-student", warning)
    shapes = student_shapes(student, losses, context)  # fails for unknown layers, before stores are staged
    paths = [local_store_path(place, context.monitor) for place in places]
    stores = [open_with_views(path, context.view_identity(), identity) for path in paths]
    fingerprints = [store.manifest.identity.fingerprint for store in stores]
    if len(set(fingerprints)) < len(fingerprints):
        raise RecipeError(
            f"student.stores has one teacher twice: {', '.join(map(str, places))} contain the same outputs."
        )
    of_embeddings = any(not store.manifest.has_logits for store in stores)
    check_output(student, losses, context, of_embeddings=of_embeddings)
    for store in stores:
        require_views(store, context.views)
    require_logits(stores, losses, student.teachers)
    for number, store in enumerate(stores):
        if store.manifest.top_k is not None:
            temperatures = temperatures_of(losses, student.teachers, number)
            for found in measure_tails(temperatures, store.manifest.top_k, tail_of(store)):
                report_tail(found, "train-student", context.monitor)
    spec = DistillationSpec(
        stores,
        shapes,
        tuple(losses),
        student.hard_label_weight,
        student.target_loading,
        student.missing_targets,
        student.teachers,
        label_smoothing=student.label_smoothing,
        heads=student.heads,
    )
    spec.to_json()  # raises if a store lacks an array
    if student.teachers.weights == "accuracy":
        spec = replace(spec, accuracies=deciding_accuracies(places, student.teachers, context))
    return spec
