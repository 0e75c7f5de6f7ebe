"""MixUp and CutMix with partners that depend on the sample, not on its batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.views.ops.boxes import Boxes, boxes_around, paste
from kdpipe.stages.views.ops.fields import Probability
from kdpipe.stages.views.ops.resample import slices
from kdpipe.stages.views.ops.rows import replace_rows
from kdpipe.stages.views.rng import CounterRNG

_MIXED, _METHOD, _PARTNER, _SHARE, _ROW, _COLUMN = range(6)

_ONE = 2**16
"""The fixed-point weight 1."""

_NUM_SHARES = 4096

Alpha = Annotated[float, Field(ge=0, le=1e12)]


@section
class MixConfig:
    """MixUp (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

    Attributes:
        mixup_alpha: lambda is drawn from Beta(alpha, alpha); 0 disables MixUp.
        cutmix_alpha: Likewise for CutMix.
        p: Fraction of the samples that are mixed.
        cutmix_share: Fraction of these mixed by CutMix, if both methods are enabled.
    """

    mixup_alpha: Alpha = 0.0
    cutmix_alpha: Alpha = 0.0
    p: Probability = 1.0
    cutmix_share: Probability = 0.5

    def __post_init__(self) -> None:
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            raise ValueError("mixing needs a mixup_alpha or a cutmix_alpha above 0: set one, or remove the section")


@dataclass(frozen=True)
class MixAssignment:
    """The partner and the mixing parameters of each sample of a batch; all tensors on the CPU.

    Attributes:
        partner_ids: Sample ids, int64 [B]; the sample's own if it is not mixed.
        own_share: Weight of the sample's own label, lambda in the papers, float32 [B]; 1 if it is not mixed. For
            CutMix the fraction of pixels outside the box, as in the paper's code.
        weights: Weight of the sample's own pixels in MixUp, in units of 1/65536, int32 [B]; 65536 without MixUp.
        boxes: Boxes that show the partner in CutMix; 0 x 0 without CutMix.
    """

    partner_ids: Tensor
    own_share: Tensor
    weights: Tensor
    boxes: Boxes

    @property
    def mixed(self) -> Tensor:
        """Whether each sample is mixed: bool [B]."""
        return self.own_share < 1

    def at(self, rows: Tensor) -> MixAssignment:
        """Return the assignment of some samples: `rows` int64 [n]."""
        boxes = Boxes(*(side[rows] for side in self.boxes))
        return MixAssignment(self.partner_ids[rows], self.own_share[rows], self.weights[rows], boxes)


def sample_mix(config: MixConfig, rng: CounterRNG, partner_pool: Tensor, size: tuple[int, int]) -> MixAssignment:
    """Draw the mix of a batch of images of `size` (H, W).

    Partners are drawn from the ids `partner_pool`, int64 [P], and depend on their order.
    """
    mixed = rng.bernoulli(config.p, _MIXED)
    cut = rng.bernoulli(_cutmix_share(config), _METHOD)
    weights = torch.where(mixed & ~cut, _sample_weights(config.mixup_alpha, rng), _ONE)
    boxes = _cutmix_boxes(torch.where(mixed & cut, _sample_weights(config.cutmix_alpha, rng), _ONE), rng, size)
    num_pixels = size[0] * size[1]
    outside = (num_pixels - boxes.heights * boxes.widths).double() / num_pixels
    own_share = (outside * weights / _ONE).float()  # one of the two is 1
    partner_ids = torch.where(own_share < 1, partner_pool[rng.integers(len(partner_pool), _PARTNER)], rng.sample_ids)
    return MixAssignment(partner_ids, own_share, weights.to(torch.int32), boxes)


def mix(images: Tensor, partner_images: Tensor, mixture: MixAssignment) -> Tensor:
    """Mix images with their partners': all uint8 [B, C, H, W]."""
    out = paste(images, partner_images, mixture.boxes)
    rows = (mixture.weights < _ONE).nonzero()[:, 0]
    if not len(rows):
        return out
    parts = [rows[part] for part in slices(len(rows), images[0].numel(), images.device)]
    return replace_rows(out, rows, torch.cat([_blend(images, partner_images, part, mixture.weights) for part in parts]))


def _blend(images: Tensor, partner_images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Apply MixUp to some rows, int64 [n], rounding half up: uint8 [n, C, H, W]; weights as in MixAssignment."""
    indices, own = (tensor.to(images.device, non_blocking=True) for tensor in (rows, weights[rows]))
    partners = partner_images.index_select(0, indices).to(torch.int32)
    total = images.index_select(0, indices).to(torch.int32).sub_(partners).mul_(own[:, None, None, None])
    return total.add_(partners, alpha=_ONE).add_(_ONE // 2).bitwise_right_shift_(16).to(torch.uint8)


def _cutmix_share(config: MixConfig) -> float:
    """Return the fraction of the mixed samples that are mixed by CutMix."""
    if config.mixup_alpha and config.cutmix_alpha:
        return config.cutmix_share
    return 1.0 if config.cutmix_alpha else 0.0


def _cutmix_boxes(weights: Tensor, rng: CounterRNG, size: tuple[int, int]) -> Boxes:
    """Draw boxes as in the paper's code: of 1 - weight of the pixels, with even sides, before clipping."""
    shares = (1 - weights.double() / _ONE).sqrt_()
    heights, widths = ((shares * side).to(torch.int64) // 2 * 2 for side in size)
    return boxes_around(rng.integers(size[0], _ROW), rng.integers(size[1], _COLUMN), heights, widths, size)


def _sample_weights(alpha: float, rng: CounterRNG) -> Tensor:
    """Draw own weights from Beta(alpha, alpha), in units of 1/65536, int64 [B]; 65536 if alpha is 0."""
    return _beta_quantiles(alpha)[rng.integers(_NUM_SHARES, _SHARE)] if alpha else torch.full_like(rng.sample_ids, _ONE)


@lru_cache
def _beta_quantiles(alpha: float) -> Tensor:
    """Return equally likely values of Beta(alpha, alpha) in units of 1/65536, ascending: int64 [_NUM_SHARES].

    An integer table, so that the last bits of logarithms and powers on another machine do not matter.
    """
    from scipy.special import betaincinv  # lazy: needed only for mixing

    quantiles = betaincinv(alpha, alpha, (np.arange(_NUM_SHARES) + 0.5) / _NUM_SHARES)
    return torch.from_numpy(np.rint(quantiles * _ONE).astype(np.int64))
