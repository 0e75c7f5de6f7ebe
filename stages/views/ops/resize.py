"""Resize batches as Pillow does, on any device, with the same bits everywhere: antialiased bilinear.

Pillow computes in integers. Here they are in float64, in which their products and sums are exact in any order. Up to
version 12 it gives these very bits; from 13 on it shrinks the height first where that is cheaper, which rounds some
pixels to the next gray level.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kdpipe.stages.views.ops.resample import slices

_BITS = 22
"""Bits of a weight, as in Pillow's Resample.c."""


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, C, H, W] to uint8 [B, C, H', W'], as `PIL.Image.resize(size, BILINEAR)` does each image.

    >>> resize(torch.tensor([[[[0, 100, 200, 255]]]], dtype=torch.uint8), (1, 2))
    tensor([[[[ 71, 209]]]], dtype=torch.uint8)
    """
    if tuple(images.shape[2:]) == size:
        return images
    rows, columns = _weights(images.shape[2], size[0]), _weights(images.shape[3], size[1])
    rows, columns = (weights.to(images.device, non_blocking=True) for weights in (rows, columns))
    widest = images.shape[1] * max(images.shape[2], size[0]) * max(images.shape[3], size[1])
    parts = [
        _rounded(rows @ _rounded(images[part].double() @ columns.T)).to(torch.uint8)
        for part in slices(len(images), widest, images.device)
    ]
    return torch.cat(parts) if parts else images.new_empty((0, images.shape[1], *size))


def _rounded(sums: Tensor) -> Tensor:
    """Return the gray levels of weighted sums in units of 2^-_BITS."""
    return sums.add_(1 << _BITS - 1).div_(1 << _BITS).floor_().clamp_(0, 255)


@lru_cache
def _weights(num_in: int, num_out: int) -> Tensor:
    """Return the weights of the places along one side, in units of 2^-_BITS: float64 [num_out, num_in]."""
    scale = num_in / num_out
    support = max(scale, 1.0)
    weights = torch.zeros(num_out, num_in, dtype=torch.float64)
    for place in range(num_out):
        center = (place + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(num_in, int(center + support + 0.5))
        triangle = [max(0.0, 1 - abs((near - center + 0.5) * (1 / support))) for near in range(first, last)]
        total = sum(triangle)
        weights[place, first:last] = torch.tensor(
            [float(int(0.5 + each / total * (1 << _BITS))) for each in triangle], dtype=torch.float64
        )
    return weights
