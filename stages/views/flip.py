"""RandomHorizontalFlip and RandomVerticalFlip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stages.config import section
from stages.views.arguments import Probability
from stages.views.draw import Draw


@section
class RandomHorizontalFlip:
    """Mirror left to right with probability `p`."""

    name: Literal["RandomHorizontalFlip"]
    p: Probability = 0.5

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        return self.overwrite(images.clone(), draw)

    def overwrite(self, images: Tensor, draw: Draw) -> Tensor:
        """The same, in place."""
        return flip_where(images, draw.chance(self.p, 0), 3)


@section
class RandomVerticalFlip:
    """Mirror top to bottom with probability `p`."""

    name: Literal["RandomVerticalFlip"]
    p: Probability = 0.5

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        return self.overwrite(images.clone(), draw)

    def overwrite(self, images: Tensor, draw: Draw) -> Tensor:
        """The same, in place."""
        return flip_where(images, draw.chance(self.p, 0), 2)


def flip_where(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Mirror the `chosen` images, bool [B] on the CPU, of uint8 [B, C, H, W] along `dim`, in place."""
    if images.device.type == "cpu":
        # numpy copies whole images; torch chooses byte by byte, which takes many times as long
        at = chosen.nonzero()[:, 0]
        images.numpy()[at.numpy()] = images.index_select(0, at).flip(dim).numpy()
        return images
    chosen = chosen.to(images.device, non_blocking=True)
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)
