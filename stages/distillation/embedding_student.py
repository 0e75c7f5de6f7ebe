"""Students of teachers without a classifier: what their embeddings tell of the classes, and their classifier.

Where no loss trains the classifier, it is the linear probe: fitted to the student's embeddings of labeled training
images after each training, so that the student classifies in every exported file. A student that returns embeddings
itself (`student.output`) needs no label: its embeddings are compared with the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.evaluation.embeddings import embeddings_of, evaluate_neighbors, examine
from kdpipe.stages.evaluation.evaluate import EvalResult, Evaluation, evaluate
from kdpipe.stages.evaluation.linear_probe import LinearProbe
from kdpipe.stages.losses.base import FeatureLoss, Loss
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.schedules import bounds
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import get_module
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.tokens import classifier_path

NUM_NEIGHBORS = 5_000
"""Labeled images, at most, among which neighbors are looked for after each epoch."""


def learns_embeddings(spec: DistillationSpec | None) -> bool:
    """Return whether a student learns from the embeddings of a teacher without a classifier."""
    return spec is not None and not all(store.manifest.has_logits for store in spec.stores)


def trains_classifier(spec: DistillationSpec) -> bool:
    """Return whether labels or a loss train the student's classifier, or it is a teacher's."""
    by_loss = any(not isinstance(loss, FeatureLoss) or isinstance(loss, SimKD) for loss in spec.losses)
    return by_loss or bounds(spec.hard_label_weight)[1] > 0


def check_output(config: StudentConfig, losses: Sequence[Loss], context: StageContext, *, of_embeddings: bool) -> None:
    """Raise RecipeError for a student whose outputs nothing trains, or whose embeddings nothing can be compared with.

    Args:
        config: The student.
        losses: Its losses.
        context: The data.
        of_embeddings: Whether one of its teachers returns embeddings.
    """
    by_loss = [loss for loss in losses if not isinstance(loss, FeatureLoss) or isinstance(loss, SimKD)]
    has_labels = context.train_set.has_labels
    if not config.is_headless:
        if of_embeddings and not by_loss and not has_labels:
            raise RecipeError(
                "no training image has a label, so that nothing trains the student's classifier: set student.output = "
                "'embeddings', and it returns what it learns from the teacher."
            )
        return
    if by_loss:
        raise RecipeError(
            f"student.output = 'embeddings' leaves out the classifier, and {by_loss[0].loss} trains it: use losses on "
            "features or relations, such as cosine, rkd or pkt, or set student.output = 'logits'."
        )
    if has_labels:
        raise RecipeError(
            "student.output = 'embeddings' is for images without labels (data.labels = 'none'): with labels the "
            "student has a classifier, fitted to its embeddings where no loss trains it; leave it out."
        )
    if not of_embeddings:
        raise RecipeError(
            "student.output = 'embeddings' is for students of a teacher of embeddings (teacher.output = 'embeddings'), "
            "and no store is of one."
        )


def labeled_for_probe(normalize: Normalization, context: StageContext) -> Evaluation | None:
    """Return the labeled training images that embeddings are judged by; None without labels there or in the test."""
    return context.labeled(normalize) if context.train_set.has_labels and context.test_set.has_labels else None


def examine_student(network: ModelBundle, spec: DistillationSpec | None, context: StageContext) -> dict[str, Any]:
    """Return the entries `knn` and `linear_probe` of a student's results, and fit its classifier if nothing trains it.

    They are empty for students of teachers with logits, and where no training or no test image has a label.
    """
    labeled = labeled_for_probe(network.normalize, context) if learns_embeddings(spec) else None
    if spec is None or labeled is None:
        return {}
    images = (labeled, context.evaluation(network.normalize))
    fitted, test = (embeddings_of(network.model.eval(), each) for each in images)
    examined = examine(fitted, test, context.train_set.num_classes)
    if not trains_classifier(spec):
        _set_classifier(network.model, examined.probe)
    return examined.to_json()


def evaluation_of_epochs(
    network: ModelBundle, spec: DistillationSpec | None, context: StageContext
) -> Callable[[nn.Module, Evaluation, torch.device], EvalResult]:
    """Return how a student is evaluated after each epoch: by k-NN if nothing trains its classifier."""
    is_judged = context.train_set.has_labels and not network.is_headless
    if spec is None or not learns_embeddings(spec) or trains_classifier(spec) or not is_judged:
        return evaluate
    return partial(evaluate_neighbors, labeled=context.labeled(network.normalize, NUM_NEIGHBORS))


@torch.no_grad()
def _set_classifier(model: nn.Module, probe: LinearProbe) -> None:
    """Copy a probe to the last layer, if that is a linear one of its shape; other layers stay untrained."""
    classifier = get_module(model, classifier_path(model))
    if isinstance(classifier, nn.Linear) and classifier.weight.shape == probe.weight.shape:
        classifier.weight.copy_(probe.weight)
        if classifier.bias is not None:
            classifier.bias.copy_(probe.bias)
