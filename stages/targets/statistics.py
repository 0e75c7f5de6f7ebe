"""Statistics of feature maps: pooled vectors, means and deviations, attention maps and Gram matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.numerics import to_float32

NO_GRADIENT = 1e-12
"""Gradients whose largest element is below this count as zero: scaling them up would only show rounding errors."""


def pool_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps [B, C, H, W] to (H, W) = `size`, never enlarging a side; return other features unchanged."""
    if maps.dim() != 4:
        return maps
    smaller = min(maps.shape[2], size[0]), min(maps.shape[3], size[1])
    return maps if smaller == maps.shape[2:] else average_pool(maps, smaller)


def average_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps [B, C, H, W] to (H, W) = `size`, with gradients that are deterministic on CUDA too."""
    return ordered_average_pool(maps, size) if maps.is_cuda else F.adaptive_avg_pool2d(maps, size)


def ordered_average_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool as F.adaptive_avg_pool2d, whose backward pass on CUDA adds in no fixed order, as this one does."""
    (height, width), (rows, columns) = maps.shape[2:], size
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(maps, (height // rows, width // columns))
    # Pooling an identity matrix gives the weights of each window.
    down, across = (
        F.adaptive_avg_pool1d(torch.eye(whole, dtype=maps.dtype, device=maps.device)[None], part)[0]
        for whole, part in ((height, rows), (width, columns))
    )
    return down.T @ maps @ across


def pooled(features: Tensor) -> Tensor:
    """Average maps [B, C, H, W] or tokens [B, L, C] over positions to [B, C], in float32 or wider; vectors stay."""
    if features.dim() == 3:
        return to_float32(features).mean(1)
    return to_float32(features).flatten(2).mean(2) if features.dim() > 3 else to_float32(features)


def attention(maps: Tensor) -> Tensor:
    """Compute attention maps: the mean over channels of the squares, L2-normalized per sample.

    [B, C, H, W] to [B, H, W], in float32 or wider. Zagoruyko and Komodakis 2017 (arXiv 1612.03928), activation-based,
    p = 2.
    """
    energy = to_float32(maps).square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def input_attention(gradient: Tensor) -> Tensor:
    """Compute the attention maps [B, H, W] of gradients [B, C, H, W], in float32 or wider, however small they are.

    A confident network has gradients of 1e-7 and less, whose squares would vanish beside the eps of the normalization.
    Scaling by a constant first changes neither the map nor its gradient.
    """
    gradient = to_float32(gradient)
    largest = gradient.detach().abs().amax((1, 2, 3), keepdim=True)
    return attention(gradient / largest.clamp_min(NO_GRADIENT))


def mean_std(maps: Tensor) -> Tensor:
    """Compute mean and standard deviation of each channel over the positions: [B, C, H, W] to [B, 2, C].

    The variance is the unbiased one plus 1e-5, as in the code of WKD (arXiv 2412.08139); of one pixel it is 1e-5. The
    result is float32 or wider.
    """
    flat = to_float32(maps).flatten(2)
    variance = flat.var(2, correction=min(1, flat.shape[2] - 1))
    return torch.stack([flat.mean(2), (variance + 1e-5).sqrt()], 1)


def gram(maps: Tensor) -> Tensor:
    """Compute Gram matrices of channels, [B, C, H, W] to [B, C, C]: the mean over positions of products, float32."""
    flat = maps.float().flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / flat.shape[2]


def spatial_gram(maps: Tensor) -> Tensor:
    """Compute Gram matrices of positions, [B, C, H, W] to [B, H W, H W], in float32 or wider.

    The mean over channels of products of L2-normalized channel maps. Huang and Wang 2017 (arXiv 1707.01219), section
    4.2.
    """
    flat = F.normalize(to_float32(maps).flatten(2), dim=2)
    return torch.bmm(flat.transpose(1, 2), flat) / flat.shape[1]
