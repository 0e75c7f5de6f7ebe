"""Apply operations to some images of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20
"""Large enough that calls cost little, small enough that temporaries are reused and mostly stay in the cache."""


def apply_to_rows(images: Tensor, rows: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replace images[rows] by operation(images[rows], *parameters), in place; block by block on the CPU.

    Images are uint8 [B, C, H, W], rows int64 [R] on the CPU, and each of the parameters [R, ...].
    """
    block = max(1, _BLOCK_BYTES // images.shape[1:].numel()) if images.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        indices = rows[part].to(images.device, non_blocking=True)
        changed = operation(images.index_select(0, indices), *(values[part] for values in parameters))
        if images.device.type == "cpu":
            images.numpy()[indices.numpy()] = changed.numpy()  # whole images at once, many times faster than torch
        else:
            images.index_copy_(0, indices, changed)


def replace_rows(images: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return images [B, C, H, W] with `others`, uint8 [n, C, H, W], in place of `rows`, int64 [n] on the CPU."""
    indices = torch.arange(len(images))
    indices[rows] = torch.arange(len(images), len(images) + len(rows))
    # same as index_copy, which is ten times slower for bytes
    return torch.cat([images, others]).index_select(0, indices.to(images.device, non_blocking=True))
