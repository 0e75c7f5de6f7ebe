"""The labels of a batch of pictures, and the cross entropy with them: a mixed sample has two, each by its share."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from stages.pictures import Pictures, Seen


@dataclass(frozen=True)
class HardLabels:
    """labels int64 [B]; where samples are mixed, also those of their partners, int64 [B], and the share of their own,
    float32 [B].
    """

    labels: Tensor
    partner_labels: Tensor | None = None
    own_share: Tensor | None = None

    def rows(self, index: Tensor) -> HardLabels:
        """The same of some of the samples, int64 [n]."""
        given = (self.labels, self.partner_labels, self.own_share)
        return HardLabels(*(None if one is None else one[index] for one in given))  # type: ignore[arg-type]

    def cross_entropy(self, logits: Tensor, smoothing: float = 0.0) -> Tensor:
        """The cross entropy of logits [B, num_classes] with the labels smoothed by `smoothing`: [B]."""
        own = F.cross_entropy(logits.float(), self.labels, reduction="none", label_smoothing=smoothing)
        if self.partner_labels is None or self.own_share is None:
            return own
        partners = F.cross_entropy(logits.float(), self.partner_labels, reduction="none", label_smoothing=smoothing)
        return self.own_share * own + (1 - self.own_share) * partners


def labels_of(pictures: Pictures, seen: Seen) -> HardLabels:
    """The labels of pictures, on the device where these are."""
    device = seen.images.device
    labels = pictures.image_set.labels[seen.positions]
    if seen.mixture is None:
        return HardLabels(labels.to(device, non_blocking=True))
    mixed, partners = seen.mixture.mixed, labels.clone()
    partners[mixed] = pictures.labels_of(seen.mixture.partners[mixed])
    return HardLabels(
        labels.to(device, non_blocking=True),
        partners.to(device, non_blocking=True),
        seen.mixture.own_share.to(device, non_blocking=True),
    )
