"""Labels of a batch and their cross-entropy; a mixed sample has two labels, weighted by their shares.

Unlabeled samples have a cross-entropy of 0, so that a batch's term is the sum over its labeled ones divided by the
batch size: Laine and Aila 2017 (arXiv 1610.02242), Tarvainen and Valpola 2017 (arXiv 1703.01780). Of a mixture of both
kinds the labeled part counts, by its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader


@dataclass(frozen=True)
class HardLabels:
    """The labels of a batch.

    Attributes:
        labels: int64 [B], -1 for unlabeled samples.
        partner_labels: Labels of the mix partners, int64 [B]; None without mixing.
        own_share: Weight of the own labels, float32 [B]; None without mixing.
        always: Whether every sample of the data set has a label.
    """

    labels: Tensor
    partner_labels: Tensor | None = None
    own_share: Tensor | None = None
    always: bool = True

    def rows(self, index: Tensor | slice) -> HardLabels:
        """Return the labels of some samples, at int64 [n] or a slice."""
        if self.partner_labels is None or self.own_share is None:
            return HardLabels(self.labels[index], always=self.always)
        return HardLabels(self.labels[index], self.partner_labels[index], self.own_share[index], self.always)

    def cross_entropy(self, logits: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of logits [B, num_classes] with the labels, smoothed by `smoothing`: [B].

        `class_weights`, float32 [num_classes], multiply that of each label.
        """
        own = _cross_entropy(logits, self.labels, smoothing, class_weights)
        if self.partner_labels is None or self.own_share is None:
            return own
        partners = _cross_entropy(logits, self.partner_labels, smoothing, class_weights)
        return self.own_share * own + (1 - self.own_share) * partners


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    losses = F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=smoothing, ignore_index=UNLABELED
    )
    return losses if class_weights is None else class_weights[labels] * losses  # -1: any weight times 0


def hard_labels_of(loader: ImageLoader, batch: ImageBatch) -> HardLabels:
    """Return the labels of a batch, on its device."""
    device = batch.images.device
    labels, always = loader.dataset.labels[batch.indices], loader.dataset.is_labeled
    if batch.mixture is None:
        return HardLabels(labels.to(device, non_blocking=True), always=always)
    mixed, partners = batch.mixture.mixed, labels.clone()
    partners[mixed] = loader.partner_labels(batch.mixture.partner_ids[mixed])
    return HardLabels(
        labels.to(device, non_blocking=True),
        partners.to(device, non_blocking=True),
        batch.mixture.own_share.to(device, non_blocking=True),
        always,
    )
