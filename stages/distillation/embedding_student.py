"""Students of teachers without a classifier: what their embeddings tell of the classes, and their classifier.

Where no loss trains the classifier, it is the linear probe: fitted to the student's embeddings of labeled training
images after each training, so that the student classifies in every exported file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.evaluation.embeddings import embeddings_of, evaluate_neighbors, examine
from kdpipe.stages.evaluation.evaluate import EvalResult, Evaluation, evaluate
from kdpipe.stages.evaluation.linear_probe import LinearProbe
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.schedules import bounds
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import get_module
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


def examine_student(network: ModelBundle, spec: DistillationSpec | None, context: StageContext) -> dict[str, Any]:
    """Return the entries `knn` and `linear_probe` of a student's results, and fit its classifier if nothing trains it.

    They are empty for students of teachers with logits, and where no training image has a label.
    """
    if spec is None or not learns_embeddings(spec) or not (context.train_set.labels >= 0).any():
        return {}
    images = (context.labeled(network.normalize), context.evaluation(network.normalize))
    fitted, test = (embeddings_of(network.model.eval(), each) for each in images)
    examined = examine(fitted, test, context.train_set.num_classes)
    if not trains_classifier(spec):
        _set_classifier(network.model, examined.probe)
    return examined.to_json()


def evaluation_of_epochs(
    network: ModelBundle, spec: DistillationSpec | None, context: StageContext
) -> Callable[[nn.Module, Evaluation, torch.device], EvalResult]:
    """Return how a student is evaluated after each epoch: by k-NN if nothing trains its classifier."""
    is_labeled = bool((context.train_set.labels >= 0).any())
    if spec is None or not learns_embeddings(spec) or trains_classifier(spec) or not is_labeled:
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
