"""Crop and resize batches of images: bilinear, in integers, so that every machine gets the same pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdpipe.stages.views.ops.boxes import Boxes

_BITS = 11
"""Bits of a weight in one direction: an 8-bit level, weighted twice, then just fits an int32."""

_CPU_SLICE_PIXELS, _GPU_SLICE_PIXELS = 2**17, 2**22
"""Pixels processed at a time: what a CPU's caches hold, or about 64 MiB of temporaries on a GPU."""


class _Neighbors(NamedTuple):
    """The two input rows (or columns) around each output row, int64 [B, num_out], and the second's weight, int32."""

    first: Tensor
    second: Tensor
    weights: Tensor


def resample(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Resize the box of each image to `size` (H', W'): uint8 [B, C, H, W] to uint8 [B, C, H', W'].

    Each box has at least one pixel and is within its image. Bilinear between pixel centers, within one gray level of
    F.interpolate(align_corners=False). Not antialiased: for boxes at most twice as large as `size`.
    """
    rows = _neighbors(boxes.tops, boxes.heights, size[0], images.device)
    columns = _neighbors(boxes.lefts, boxes.widths, size[1], images.device)
    widest = images.shape[1] * max(images.shape[2], size[0]) * max(images.shape[3], size[1])
    parts = [
        _resample_slice(images[part], _Neighbors(*(t[part] for t in rows)), _Neighbors(*(t[part] for t in columns)))
        for part in slices(len(images), widest, images.device)
    ]
    return torch.cat(parts) if parts else images.new_empty((0, images.shape[1], *size))


def slices(num_samples: int, sample_pixels: int, device: torch.device) -> Iterator[slice]:
    """Slice a batch such that int32 temporaries of `sample_pixels` for each sample stay small."""
    step = max(1, (_CPU_SLICE_PIXELS if device.type == "cpu" else _GPU_SLICE_PIXELS) // sample_pixels)
    return (slice(start, start + step) for start in range(0, num_samples, step))


def _neighbors(starts: Tensor, lengths: Tensor, num_out: int, device: torch.device) -> _Neighbors:
    """Return the neighbors along one side of the boxes.

    Output place i is at (i + 1/2) * length / num_out - 1/2 of the box: computed in units of 1 / (2 * num_out), so that
    only the weight is rounded.
    """
    numerators = (2 * torch.arange(num_out) + 1) * lengths[:, None] - num_out
    numerators.clamp_(min=0)  # places before the first pixel's center show the first pixel
    first, rest = numerators // (2 * num_out), numerators % (2 * num_out)
    second = torch.minimum(first + 1, lengths[:, None] - 1)
    weights = ((rest << _BITS) + num_out) // (2 * num_out)
    found = (first + starts[:, None], second + starts[:, None], weights.to(torch.int32))
    return _Neighbors(*(tensor.to(device, non_blocking=True) for tensor in found))


def _resample_slice(images: Tensor, rows: _Neighbors, columns: _Neighbors) -> Tensor:
    """Resize uint8 [b, C, H, W] to uint8 [b, C, H', W']: first along the rows, then across them."""
    left, right = (_columns(images, side) for side in (columns.first, columns.second))
    narrow = _blend(left, right, columns.weights[:, None, None, :])
    above, below = (_rows(narrow, side) for side in (rows.first, rows.second))
    pixels = _blend(above, below, rows.weights[:, None, :, None])
    return pixels.add_(1 << 2 * _BITS - 1).bitwise_right_shift_(2 * _BITS).to(torch.uint8)


def _columns(images: Tensor, indices: Tensor) -> Tensor:
    """Select columns of each image: [b, C, H, W] and int64 [b, W'] to int32 [b, C, H, W']."""
    return images.gather(3, indices[:, None, None, :].expand(*images.shape[:3], -1)).to(torch.int32)


def _rows(images: Tensor, indices: Tensor) -> Tensor:
    """Select rows of each image: [b, C, H, W] and int64 [b, H'] to [b, C, H', W]."""
    batch, channels, height, width = images.shape
    planes = torch.arange(batch * channels, device=images.device).reshape(batch, channels, 1)
    index = (planes * height + indices[:, None]).flatten()
    return images.reshape(-1, width).index_select(0, index).reshape(batch, channels, -1, width)


def _blend(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return ((1 - w) * first + w * second) * 2^_BITS, int32, for weights w * 2^_BITS; overwrites `second`."""
    return second.sub_(first).mul_(weights).add_(first, alpha=1 << _BITS)
