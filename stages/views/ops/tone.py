"""Tone operations as in torchvision: posterize, solarize, autocontrast, equalize, sharpness.

Images and results are uint8 [B, C, H, W], parameters [B] on the CPU. RandAugment uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.stages.views.ops.color import blend

_THIRTEENTH, _THIRTEENTH_BITS = 5042, 16
"""x * 5042 >> 16 is x // 13 for every x up to 6,553: integer division is many times slower."""


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits`, int64 [B] from 0 to 8, of every pixel."""
    masks = (256 - (1 << (8 - bits))).to(torch.uint8)
    return images & masks.to(images.device, non_blocking=True)[:, None, None, None]


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels at or above `thresholds`, float64 [B] from 0 to 255."""
    least = thresholds.ceil().to(torch.uint8).to(images.device, non_blocking=True)[:, None, None, None]
    # 0 or 255 from a comparison: torch.where selects byte by byte, which is many times slower
    return images ^ (images >= least).view(torch.uint8).neg_()


def autocontrast(images: Tensor) -> Tensor:
    """Stretch the levels of every channel to 0 ... 255; a channel of one level is unchanged."""
    low, high = (extreme.float() for extreme in (images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)))
    # float32, step by step as in torchvision, to reproduce its rounding; IEEE fixes the bits of each step
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255.0))
    low = torch.where(flat, 0.0, low)
    return images.float().sub_(low).div_(scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of every channel, by the rule of PIL and torchvision."""
    batch, channels, height, width = images.shape
    levels = images.reshape(batch * channels, -1)
    tables = _equalizing_tables(_histograms(levels), levels.amax(1, keepdim=True), height * width)
    return tables.gather(1, levels.long()).reshape(images.shape)


def _histograms(levels: Tensor) -> Tensor:
    """Count each level: uint8 [R, L] to int64 [R, 256]."""
    counts = torch.zeros(len(levels), 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(1, levels.long(), counts.new_ones(()).expand(levels.shape))  # bincount waits for a GPU


def _equalizing_tables(counts: Tensor, highest: Tensor, num_pixels: int) -> Tensor:
    """Return the new level of each old one, uint8 [R, 256]: counts int64 [R, 256], highest level uint8 [R, 1]."""
    step = (num_pixels - counts.gather(1, highest.long())) // 255
    below = counts.cumsum(1) - counts
    # float64 division and floor are exact for integers of this size, and faster
    table = ((below + step // 2).double() / step.clamp(min=1)).floor_().clamp_(max=255)
    unchanged = torch.arange(256, device=counts.device)
    return torch.where(step == 0, unchanged, table).to(torch.uint8)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Return images * factor + blurred images * (1 - factor); factors float64 [B], 0 to 64.

    Blurred with 3 x 3 weights of 1/13, the middle 5/13; border pixels, and images of fewer than three rows or columns,
    are unchanged.
    """
    if min(images.shape[2:]) <= 2:
        return images
    levels = images.to(torch.int16)  # 13 * 255 fits
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    inner = levels[:, :, 1:-1, 1:-1]
    sums = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
    blurred = (sums.int() + 6).mul_(_THIRTEENTH).bitwise_right_shift_(_THIRTEENTH_BITS)
    sharpened = images.clone()
    sharpened[:, :, 1:-1, 1:-1] = blend(images[:, :, 1:-1, 1:-1], blurred, factors)
    return sharpened
