"""Build the training task of a cohort: the losses between its members, and those from stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.losses import CohortLosses, build_peer_losses, members_of
from kdpipe.stages.cohort.network import Cohort, member_seed
from kdpipe.stages.cohort.task import CohortTask
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.compatibility import check_combination
from kdpipe.stages.distillation.spec import DistillationSpec, shapes_of
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import Distillation, build_distillation, student_layers
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.targets.ensemble import TeacherEnsemble
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import Targets


@dataclass(frozen=True)
class CohortPlan:
    """What a cohort is trained by.

    Attributes:
        config: The recipe's `cohort` section.
        student: The recipe's `student` section.
        specs: For each member the opened stores and losses; none without a teacher.
    """

    config: CohortConfig
    student: StudentConfig
    specs: Sequence[DistillationSpec] = ()


def build_task(plan: CohortPlan, cohort: Cohort, seed: int, context: StageContext) -> CohortTask:
    """Build the training task of a cohort.

    Raises:
        ModelError: A member lacks the layer of a loss.
        RecipeError: The features of two members, or of a member and a store, do not match.
    """
    config, specs = plan.config, plan.specs
    dataset = DatasetInfo(context.train_set.num_samples, context.train_set.num_classes)
    shapes = [_shapes(member, config.distill, context) for member in cohort.members]
    between = build_peer_losses(config.distill, shapes, dataset, derive_seed(seed, "peer adapters"))
    stored, targets = _stored(specs, cohort, seed, dataset, context) if specs else ([], None)
    exchange = CohortLosses(config, between, stored)
    if config.method == "codistillation":
        exchange.set_peers(members_of(cohort.joint.model))
    layers = [
        list(dict.fromkeys([*own, *(student_layers(specs[number].losses) if specs else ())]))
        for number, own in enumerate(shapes)
    ]
    return CohortTask(
        context.train_loader,
        context.views.num_views,
        cohort.joint.normalize,
        targets=targets,
        fresh_views=not context.views.replay,
        distillation=exchange,
        hard_label_weight=plan.student.hard_label_weight if specs else 1.0,
        label_smoothing=plan.student.label_smoothing,
        layers=layers,
    )


def _shapes(member: ModelBundle, losses: Sequence[Loss], context: StageContext) -> Shapes:
    """Return the shapes of all features of a member that the losses between members use, on either side."""
    own = student_layers(losses)
    shapes = feature_shapes(member.model, own, context.image_shape)
    wanted = [feature.layer for loss in losses for feature in loss.required_features(shapes)]
    return feature_shapes(member.model, dict.fromkeys([*own, *wanted]), context.image_shape)


def _stored(
    specs: Sequence[DistillationSpec], cohort: Cohort, seed: int, dataset: DatasetInfo, context: StageContext
) -> tuple[list[Distillation], Targets]:
    """Return the losses of each member from the stores, and the targets that all of them need."""
    first = specs[0]
    sources = [
        join(
            store,
            context.train_set,
            list(dict.fromkeys(feature for spec in specs for feature in spec.required[number])),
            first.missing_targets,
            first.teachers.class_map(number),
        )
        for number, store in enumerate(first.stores)
    ]
    targets = Targets(sources, context.device, first.target_loading)
    check_combination(first, sources, targets)
    losses = [
        build_distillation(
            spec.losses,
            feature_shapes(member.model, student_layers(spec.losses), context.image_shape),
            [shapes_of(source) for source in sources],
            ensemble=TeacherEnsemble(spec.teachers, len(sources), spec.accuracies),
            dataset=dataset,
            seed=derive_seed(member_seed(seed, number), "adapters"),
        )
        for number, (spec, member) in enumerate(zip(specs, cohort.members, strict=True))
    ]
    return losses, targets
