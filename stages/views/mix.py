"""MixUp and CutMix: a picture mixed with that of a partner, which depends on the sample and not on its batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.views.arguments import Probability
from stages.views.boxes import Boxes, boxes_around, pasted
from stages.views.draw import Draw
from stages.views.resample import slices
from stages.views.rows import replaced

_MIXED, _METHOD, _PARTNER, _SHARE, _ROW, _COLUMN = range(6)

_ONE = 2**16
"""A weight of 1."""

_NUM_SHARES = 4096

Alpha = Annotated[float, Field(ge=0, le=1e12)]


@section
class MixConfig:
    """MixUp (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

    mixup_alpha, cutmix_alpha: the share that a sample keeps is drawn from Beta(alpha, alpha); 0 leaves the method out.
    p: how many of the samples are mixed.
    cutmix_share: of these, how many by CutMix, where both methods are on.
    """

    mixup_alpha: Alpha = 0.0
    cutmix_alpha: Alpha = 0.0
    p: Probability = 1.0
    cutmix_share: Probability = 0.5

    def __post_init__(self) -> None:
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            raise ValueError("mixing needs a mixup_alpha or a cutmix_alpha above 0: set one, or leave the section out")


@dataclass(frozen=True)
class Mixture:
    """With whom each sample of a batch is mixed, and how; all tensors on the CPU.

    partners: int64 [B], sample ids; its own where a sample is not mixed.
    own_share: float32 [B], the share of its own label, called lambda in the papers; 1 where it is not mixed. For
    CutMix the share of pixels that the box leaves, as in the paper's code.
    weights: int32 [B], of a sample's own pixels in MixUp, of 65536; that where it is not MixUp's.
    boxes: what shows the partner in CutMix; 0 x 0 where it is not CutMix's.
    """

    partners: Tensor
    own_share: Tensor
    weights: Tensor
    boxes: Boxes

    @property
    def mixed(self) -> Tensor:
        """Which samples are mixed at all: bool [B]."""
        return self.own_share < 1

    def at(self, rows: Tensor) -> Mixture:
        """That of some of the samples: `rows` int64 [n]."""
        boxes = Boxes(*(side[rows] for side in self.boxes))
        return Mixture(self.partners[rows], self.own_share[rows], self.weights[rows], boxes)


def draw_mixture(config: MixConfig, draw: Draw, population: Tensor, size: tuple[int, int]) -> Mixture:
    """The mixture of a batch of pictures of `size` (H, W).

    population: int64 [P], the ids that partners are drawn from; the same ones in the same order give the same partners.
    """
    mixed = draw.chance(config.p, _MIXED)
    cut = draw.chance(_cutmix_share(config), _METHOD)
    weights = torch.where(mixed & ~cut, _drawn_weights(config.mixup_alpha, draw), _ONE)
    boxes = _cutmix_boxes(torch.where(mixed & cut, _drawn_weights(config.cutmix_alpha, draw), _ONE), draw, size)
    num_pixels = size[0] * size[1]
    left = (num_pixels - boxes.heights * boxes.widths).double() / num_pixels
    own_share = (left * weights / _ONE).float()  # one of the two is 1
    partners = torch.where(own_share < 1, population[draw.below(len(population), _PARTNER)], draw.sample_ids)
    return Mixture(partners, own_share, weights.to(torch.int32), boxes)


def mix(images: Tensor, partner_images: Tensor, mixture: Mixture) -> Tensor:
    """Images mixed with their partners': uint8 [B, C, H, W], all three."""
    out = pasted(images, partner_images, mixture.boxes)
    rows = (mixture.weights < _ONE).nonzero()[:, 0]
    if not len(rows):
        return out
    parts = [rows[part] for part in slices(len(rows), images[0].numel(), images.device)]
    return replaced(out, rows, torch.cat([_blend(images, partner_images, part, mixture.weights) for part in parts]))


def _blend(images: Tensor, partner_images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Some rows, int64 [n], of a batch in MixUp, rounded half up: uint8 [n, C, H, W]; weights as in Mixture."""
    at, own = (tensor.to(images.device, non_blocking=True) for tensor in (rows, weights[rows]))
    theirs = partner_images.index_select(0, at).to(torch.int32)
    total = images.index_select(0, at).to(torch.int32).sub_(theirs).mul_(own[:, None, None, None])
    return total.add_(theirs, alpha=_ONE).add_(_ONE // 2).bitwise_right_shift_(16).to(torch.uint8)


def _cutmix_share(config: MixConfig) -> float:
    """Of the samples that are mixed, how many by CutMix."""
    if config.mixup_alpha and config.cutmix_alpha:
        return config.cutmix_share
    return 1.0 if config.cutmix_alpha else 0.0


def _cutmix_boxes(weights: Tensor, draw: Draw, size: tuple[int, int]) -> Boxes:
    """The boxes of the paper's code: of share 1 - weight of the pixels, sides even, before the border cuts them off."""
    shares = (1 - weights.double() / _ONE).sqrt_()
    heights, widths = ((shares * side).to(torch.int64) // 2 * 2 for side in size)
    return boxes_around(draw.below(size[0], _ROW), draw.below(size[1], _COLUMN), heights, widths, size)


def _drawn_weights(alpha: float, draw: Draw) -> Tensor:
    """A sample's own weight, of 65536, from Beta(alpha, alpha): int64 [B]; all of it where alpha is 0."""
    return _beta_quantiles(alpha)[draw.below(_NUM_SHARES, _SHARE)] if alpha else torch.full_like(draw.sample_ids, _ONE)


@lru_cache
def _beta_quantiles(alpha: float) -> Tensor:
    """Numbers of 65536 that Beta(alpha, alpha) gives with equal chances, ascending: int64 [_NUM_SHARES].

    A table of whole numbers: what the last bits of a logarithm or a power are on another machine does not matter.
    """
    from scipy.special import betaincinv  # of all commands, only those that mix need it

    quantiles = betaincinv(alpha, alpha, (np.arange(_NUM_SHARES) + 0.5) / _NUM_SHARES)
    return torch.from_numpy(np.rint(quantiles * _ONE).astype(np.int64))
