"""Build students and the training tasks that they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdpipe.stages.context import Setup, model_normalisation
from kdpipe.stages.distillation.classifier_reuse import with_teachers_classifier
from kdpipe.stages.distillation.compatibility import check_together
from kdpipe.stages.distillation.spec import Teaching, shapes_of
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.losses.base import Entry
from kdpipe.stages.losses.distillation import build_distillation, student_layers
from kdpipe.stages.losses.features.simkd import SimKDConfig
from kdpipe.stages.losses.inputs import Facts, Shapes
from kdpipe.stages.models.bundle import Network
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.targets.ensemble import Combination
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.training.task import Lesson


def student_shapes(config: StudentConfig, losses: Sequence[Entry], setup: Setup) -> Shapes:
    """Return the shapes of the student's features for `losses`; raises ModelError for unknown paths."""
    model = fresh_student(config, config.seeds[0], setup).model
    return feature_shapes(model, student_layers(losses), setup.image_shape)


def build_lesson(
    network: Network,
    teaching: Teaching | None,
    seed: int,
    setup: Setup,
    *,
    label_smoothing: float = 0.0,
    settled: bool = False,
) -> Lesson:
    """Build the training task of `network`.

    Without `teaching` it has hard labels only, smoothed by `label_smoothing`. `seed` initializes the losses' adapters;
    `settled` means that all schedules have ended, as in fine-tuning.
    """
    views = setup.views
    lesson = Lesson(setup.pictures, views.num_views, network.normalise, fresh_views=not views.replay)
    if teaching is None:
        return replace(lesson, label_smoothing=label_smoothing)
    sources = teaching.sources(setup)
    distillation = build_distillation(
        teaching.losses,
        feature_shapes(network.model, student_layers(teaching.losses), setup.image_shape),
        [shapes_of(source) for source in sources],
        combination=Combination(teaching.teachers, len(sources), teaching.accuracies),
        facts=Facts(setup.train_set.num_samples, setup.train_set.num_classes),
        seed=derive_seed(seed, "adapters"),
    )
    targets = Targets(sources, setup.device, teaching.read)
    check_together(teaching, sources, targets)
    return replace(
        lesson,
        targets=targets,
        distillation=distillation,
        hard_label_weight=teaching.hard_label_weight,
        label_smoothing=teaching.label_smoothing,
        settled=settled,
    )


def fresh_student(config: StudentConfig, seed: int, setup: Setup, losses: Sequence[Entry] = ()) -> Network:
    """Build the untrained student of a seed, with the modules that `losses` add to it."""
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    network = Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            own = derive_seed(seed, "projector")
            network = with_teachers_classifier(network, loss, setup.run, setup.image_shape, own)
    return network
