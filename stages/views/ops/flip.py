"""RandomHorizontalFlip and RandomVerticalFlip."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.views.ops.fields import KeepsSize, Probability
from kdpipe.stages.views.rng import CounterRNG


class _RandomFlip(KeepsSize):
    p: float
    _dim: ClassVar[int]

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Flip uint8 [B, C, H, W]."""
        return self.overwrite(images.clone(), rng)

    def overwrite(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Flip in place."""
        return flip_where(images, rng.bernoulli(self.p, 0), self._dim)


@section
class RandomHorizontalFlip(_RandomFlip):
    """Mirror left to right with probability `p`."""

    name: Literal["RandomHorizontalFlip"]
    p: Probability = 0.5
    _dim = 3


@section
class RandomVerticalFlip(_RandomFlip):
    """Mirror top to bottom with probability `p`."""

    name: Literal["RandomVerticalFlip"]
    p: Probability = 0.5
    _dim = 2


def flip_where(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Mirror the `chosen` images, bool [B] on the CPU, of uint8 [B, C, H, W] along `dim`, in place."""
    if images.device.type == "cpu":
        # numpy copies whole images; torch selects byte by byte, which is many times slower
        rows = chosen.nonzero()[:, 0]
        images.numpy()[rows.numpy()] = images.index_select(0, rows).flip(dim).numpy()
        return images
    chosen = chosen.to(images.device, non_blocking=True)
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)
