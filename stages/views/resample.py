"""Crops of a batch of images, resized: bilinear, in whole numbers, so that every machine gets the same pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.views.boxes import Boxes

_BITS = 11
"""Of a weight in one direction: a grey level of 8 bits, weighted twice, then just fits an int32."""

_CPU_SLICE_PIXELS, _GPU_SLICE_PIXELS = 2**17, 2**22
"""How many pixels are worked on at a time: on a CPU what its caches hold, elsewhere some 64 MiB of temporaries."""


class _Neighbours(NamedTuple):
    """The two rows (or columns) of each image that a row of the output lies between, and the weight of the second.

    int64 [B, num_out], the weights int32.
    """

    first: Tensor
    second: Tensor
    weights: Tensor


def resample(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """The box of each image, resized to `size` (H', W'): uint8 [B, C, H, W] to uint8 [B, C, H', W'].

    Each box has a pixel at least, and lies within its image.
    Bilinear between the centres of pixels, as F.interpolate(align_corners=False), which it meets within one grey level.
    There is no antialiasing: made for boxes that are enlarged, or are at most twice as large as `size`.
    """
    rows = _neighbours(boxes.tops, boxes.heights, size[0], images.device)
    columns = _neighbours(boxes.lefts, boxes.widths, size[1], images.device)
    widest = images.shape[1] * max(images.shape[2], size[0]) * max(images.shape[3], size[1])
    parts = [
        _resample_slice(images[part], _Neighbours(*(t[part] for t in rows)), _Neighbours(*(t[part] for t in columns)))
        for part in slices(len(images), widest, images.device)
    ]
    return torch.cat(parts) if parts else images.new_empty((0, images.shape[1], *size))


def slices(num_samples: int, sample_pixels: int, device: torch.device) -> Iterator[slice]:
    """Runs of samples few enough for int32 temporaries, of `sample_pixels` for each, to stay small."""
    step = max(1, (_CPU_SLICE_PIXELS if device.type == "cpu" else _GPU_SLICE_PIXELS) // sample_pixels)
    return (slice(start, start + step) for start in range(0, num_samples, step))


def _neighbours(starts: Tensor, lengths: Tensor, num_out: int, device: torch.device) -> _Neighbours:
    """Along one side of the boxes.

    Place i of the output lies at (i + 1/2) * length / num_out - 1/2 of the box: a fraction, kept as one over
    2 * num_out, so that nothing is rounded before the weight is.
    """
    numerators = (2 * torch.arange(num_out) + 1) * lengths[:, None] - num_out
    numerators.clamp_(min=0)  # places before the first pixel's centre show the first pixel
    first, rest = numerators // (2 * num_out), numerators % (2 * num_out)
    second = torch.minimum(first + 1, lengths[:, None] - 1)
    weights = ((rest << _BITS) + num_out) // (2 * num_out)
    found = (first + starts[:, None], second + starts[:, None], weights.to(torch.int32))
    return _Neighbours(*(tensor.to(device, non_blocking=True) for tensor in found))


def _resample_slice(images: Tensor, rows: _Neighbours, columns: _Neighbours) -> Tensor:
    """uint8 [b, C, H, W] to uint8 [b, C, H', W']: first along the rows, then across them."""
    left, right = (_columns(images, at) for at in (columns.first, columns.second))
    narrow = _blend(left, right, columns.weights[:, None, None, :])
    above, below = (_rows(narrow, at) for at in (rows.first, rows.second))
    pixels = _blend(above, below, rows.weights[:, None, :, None])
    return pixels.add_(1 << 2 * _BITS - 1).bitwise_right_shift_(2 * _BITS).to(torch.uint8)


def _columns(images: Tensor, at: Tensor) -> Tensor:
    """Columns at[b] of each image: [b, C, H, W] and int64 [b, W'] to int32 [b, C, H, W']."""
    return images.gather(3, at[:, None, None, :].expand(*images.shape[:3], -1)).to(torch.int32)


def _rows(images: Tensor, at: Tensor) -> Tensor:
    """Rows at[b] of each image: [b, C, H, W] and int64 [b, H'] to [b, C, H', W]."""
    batch, channels, height, width = images.shape
    planes = torch.arange(batch * channels, device=images.device).reshape(batch, channels, 1)
    index = (planes * height + at[:, None]).flatten()
    return images.reshape(-1, width).index_select(0, index).reshape(batch, channels, -1, width)


def _blend(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """(1 - w) * first + w * second of int32 tensors, times 2^_BITS as the weights are. Overwrites the second."""
    return second.sub_(first).mul_(weights).add_(first, alpha=1 << _BITS)
