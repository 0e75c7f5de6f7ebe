"""Build students and the training tasks that they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kdpipe.stages.context import StageContext, model_normalization
from kdpipe.stages.data.image_set import require_labels
from kdpipe.stages.distillation.classifier_reuse import reuse_teacher_classifier
from kdpipe.stages.distillation.compatibility import check_combination, check_hard_label_views
from kdpipe.stages.distillation.spec import DistillationSpec, shapes_of
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import build_distillation, student_layers
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.targets.ensemble import TeacherEnsemble
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.training.heads import second_heads
from kdpipe.stages.training.task import TrainingTask


def student_shapes(config: StudentConfig, losses: Sequence[Loss], context: StageContext) -> Shapes:
    """Return the shapes of the student's features for `losses`; it warns of a second head that learns as the first.

    Raises:
        ModelError: There is no module at a path.
        RecipeError: One of `student.heads` does not return logits.
    """
    model = build_student(config, config.seeds[0], context).model
    image_shape = context.resized(config.image_size).image_shape
    config.heads.check(model, image_shape, context.train_set.num_classes)
    if losses and not config.heads.layers and (found := list(second_heads(model))):
        labels, distillation = found
        context.monitor.warn_once(
            "train-student",
            f"{config.model.name} has two classifiers, and both learn the labels and the teacher: student.heads = "
            f'{{ labels = "{labels}", distillation = "{distillation}" }} trains it as DeiT was.',
        )
    return feature_shapes(model, student_layers(losses), image_shape)


def label_settings(student: StudentConfig) -> dict[str, Any]:
    """Return the arguments of `build_task` that say how a student learns from labels."""
    return {"label_smoothing": student.label_smoothing, "hard_label_views": student.hard_label_views}


def build_task(
    network: ModelBundle,
    spec: DistillationSpec | None,
    seed: int,
    context: StageContext,
    *,
    label_smoothing: float = 0.0,
    hard_label_views: Sequence[str] = (),
    is_fine_tuning: bool = False,
) -> TrainingTask:
    """Build the training task of `network`.

    Without `spec` it has hard labels only, smoothed by `label_smoothing`. `hard_label_views` are the kinds of views
    that have them, by default all. `seed` initializes the losses' adapters; `is_fine_tuning` means that all schedules
    have ended, as in fine-tuning.
    """
    views = context.views
    check_hard_label_views(hard_label_views, views)
    task = TrainingTask(
        context.train_loader,
        views.num_views,
        network.normalize,
        fresh_views=not views.replay,
        hard_label_views=hard_label_views,
    )
    if spec is None:
        require_labels(context.train_set)
        return replace(task, label_smoothing=label_smoothing)
    sources = spec.join_stores(context.train_set)
    distillation = build_distillation(
        spec.losses,
        feature_shapes(network.model, spec.student_layers, context.image_shape),
        [shapes_of(source) for source in sources],
        ensemble=TeacherEnsemble(spec.teachers, len(sources), spec.accuracies),
        dataset=DatasetInfo(context.train_set.num_samples, context.train_set.num_classes),
        seed=derive_seed(seed, "adapters"),
        kinds=tuple(views.kinds),
    )
    targets = Targets(sources, context.device, spec.target_loading)
    check_combination(spec, sources, targets)
    return replace(
        task,
        targets=targets,
        distillation=distillation,
        hard_label_weight=spec.hard_label_weight,
        label_smoothing=spec.label_smoothing,
        is_fine_tuning=is_fine_tuning,
        heads=spec.heads,
    )


def build_student(
    config: StudentConfig, seed: int, context: StageContext, spec: DistillationSpec | None = None
) -> ModelBundle:
    """Build the untrained student of a seed, with the modules that the losses of `spec` add to it."""
    context = config.context(context)
    normalize = model_normalization(context.train_set, config.model, config.mean, config.std)
    network = ModelBundle(context.build_model(config.model, seed), context.architecture(config.model), normalize)
    for loss in spec.losses if spec else ():
        if spec and isinstance(loss, SimKD):
            own = derive_seed(seed, "projector")
            network = reuse_teacher_classifier(network, loss, spec.head_for(loss), context.image_shape, own)
    return network
