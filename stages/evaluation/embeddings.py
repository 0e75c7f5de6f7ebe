"""Embeddings of a set of images: what goes into a network's classifier, or what a network without one returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.evaluation.evaluate import EvalResult, Evaluation, of_teacher, predict
from kdpipe.stages.evaluation.knn import KNN
from kdpipe.stages.evaluation.linear_probe import LinearProbe, fit_probe
from kdpipe.stages.models.hooks import FeatureExtractor, extract_features
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.targets.statistics import pooled

MAX_LABELED = 50_000
"""Training images that k-NN and linear probes are fitted to, at most."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of labeled images: vectors float32 [N, D], labels int64 [N]."""

    vectors: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examined:
    """What embeddings tell of the classes: both classifiers are fitted to training images.

    Attributes:
        knn: The nearest neighbors.
        probe: The linear probe.
        accuracies: Accuracy of each on the test images, by `knn` and `linear_probe`.
    """

    knn: KNN
    probe: LinearProbe
    accuracies: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the entries of a job's results."""
        num_images = len(self.knn.labels)
        return {
            "knn": {"accuracy": self.accuracies["knn"], "k": self.knn.k, "num_images": num_images},
            "linear_probe": {
                "accuracy": self.accuracies["linear_probe"],
                "l2": self.probe.l2,
                "num_images": num_images,
            },
        }


def examine(fitted: Embeddings, test: Embeddings, num_classes: int) -> Examined:
    """Fit k-NN and a linear probe to embeddings of training images, and evaluate them on those of test images."""
    knn = KNN(fitted.vectors, fitted.labels, num_classes)
    probe = fit_probe(fitted.vectors, fitted.labels, num_classes)
    found = {"knn": knn(test.vectors), "linear_probe": probe(test.vectors)}
    right = {name: logits.argmax(1).cpu() == test.labels for name, logits in found.items()}
    return Examined(knn, probe, {name: float(correct.double().mean()) for name, correct in right.items()})


def evaluate_neighbors(model: nn.Module, test: Evaluation, device: torch.device, *, labeled: Evaluation) -> EvalResult:
    """Evaluate the embeddings of a network, whatever its classifier is, by k-NN among those of labeled images."""
    fitted = embeddings_of(model, replace(labeled, compute=test.compute))
    found = embeddings_of(model, test)
    votes = KNN(fitted.vectors, fitted.labels, len(test.class_names))(found.vectors).cpu()
    accuracy = float((votes.argmax(1) == found.labels).double().mean())
    return EvalResult(accuracy, float(F.cross_entropy(votes, found.labels)))


def with_probe(model: nn.Module, labeled: Evaluation | None, test: Evaluation) -> tuple[Evaluation, dict[str, Any]]:
    """Return the evaluation of a teacher without a classifier, by a linear probe, and the entries of its results.

    Without labeled images there is none, and the teacher is compared with itself.
    """
    if labeled is None:
        return of_teacher(replace(test, of_embeddings=True), model), {}
    examined = examine(embeddings_of(model, labeled), embeddings_of(model, test), len(test.class_names))
    return replace(test, head=examined.probe), examined.to_json()


def embeddings_of(model: nn.Module, images: Evaluation) -> Embeddings:
    """Return the embeddings of the labeled ones of some images, the vectors on the device.

    Raises NotFiniteError if they are not finite.
    """
    images = replace(images, of_embeddings=False)  # the labels are wanted
    vectors, labels = [], []
    with extract_features(model, [PRE_LOGITS]) as extractor:
        for found in predict(_Embedder(model, extractor), images, images.device):
            is_labeled = found.labels >= 0
            vectors.append(found.logits[is_labeled])
            labels.append(found.labels[is_labeled].cpu())
    embeddings = Embeddings(torch.cat(vectors), torch.cat(labels))
    if not embeddings.vectors.isfinite().all():
        raise NotFiniteError("the network's embeddings hold NaN or infinity: look at its weights and input scaling.")
    return embeddings


class _Embedder(nn.Module):
    """A network that returns its embeddings [B, D]."""

    def __init__(self, model: nn.Module, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.model = model
        self._extract = extractor
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return pooled(self._extract(images).features[PRE_LOGITS])
