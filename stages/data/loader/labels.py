"""Labels of a batch and their cross-entropy; a mixed sample has two labels, weighted by their shares.

Unlabeled samples have a cross-entropy of 0, so that a batch's term is the sum over its labeled ones divided by the
batch size: Laine and Aila 2017 (arXiv 1610.02242), Tarvainen and Valpola 2017 (arXiv 1703.01780). Of a mixture of both
kinds the labeled part counts, by its share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader
from kdpipe.stages.data.measures import target_losses
from kdpipe.stages.data.tasks import CLASSIFICATION, Task


@dataclass(frozen=True)
class HardLabels:
    """The labels of a batch.

    Attributes:
        labels: int64 [B], -1 for unlabeled samples; of other tasks than classification float32 [B, K], NaN if unknown.
        partner_labels: Labels of the mix partners, of the same shape; None without mixing.
        own_share: Weight of the own labels, float32 [B]; None without mixing.
        always: Whether every sample of the data set has a label.
    """

    labels: Tensor
    partner_labels: Tensor | None = None
    own_share: Tensor | None = None
    always: bool = True
    task: Task = CLASSIFICATION

    @property
    def classes(self) -> Tensor:
        """The class of each sample, int64 [B]; -1 where it has none."""
        if self.task == CLASSIFICATION:
            return self.labels
        return torch.full((len(self.labels),), UNLABELED, device=self.labels.device)

    @property
    def targets(self) -> Tensor | None:
        """The labels or numbers of each sample, float32 [B, K], NaN if unknown; None of classes."""
        return None if self.task == CLASSIFICATION else self.labels

    def rows(self, index: Tensor | slice) -> HardLabels:
        """Return the labels of some samples, at int64 [n] or a slice."""
        some = replace(self, labels=self.labels[index])
        if self.partner_labels is None or self.own_share is None:
            return some
        return replace(some, partner_labels=self.partner_labels[index], own_share=self.own_share[index])

    def losses(self, outputs: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None) -> Tensor:
        """Return the loss of each sample, [B], from outputs [B, K]: the cross-entropy with its class or labels.

        Numbers have the mean squared error. Classes are smoothed by `smoothing`, and `class_weights`, float32 [K],
        multiply the loss of each.
        """

        def losses(labels: Tensor) -> Tensor:
            if self.task != CLASSIFICATION:
                return target_losses(self.task, outputs, labels)
            return _cross_entropy(outputs, labels, smoothing, class_weights)

        if self.partner_labels is None or self.own_share is None:
            return losses(self.labels)
        return self.own_share * losses(self.labels) + (1 - self.own_share) * losses(self.partner_labels)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    losses = F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=smoothing, ignore_index=UNLABELED
    )
    return losses if class_weights is None else class_weights[labels] * losses  # -1: any weight times 0


def hard_labels_of(loader: ImageLoader, batch: ImageBatch) -> HardLabels:
    """Return the labels of a batch, on its device."""
    device = batch.images.device
    dataset = loader.dataset
    labels, always = dataset.labels_at(batch.indices), dataset.is_labeled
    if batch.mixture is None:
        return HardLabels(labels.to(device, non_blocking=True), always=always, task=dataset.task)
    mixed, partners = batch.mixture.mixed, labels.clone()
    partners[mixed] = loader.partner_labels(batch.mixture.partner_ids[mixed])
    return HardLabels(
        labels.to(device, non_blocking=True),
        partners.to(device, non_blocking=True),
        batch.mixture.own_share.to(device, non_blocking=True),
        always,
        dataset.task,
    )
