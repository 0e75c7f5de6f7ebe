"""Work on some images of a batch, the others left as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20
"""So large that calls cost little, so small that what they allocate is reused and mostly stays in the cache."""


def on_rows(images: Tensor, rows: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replace images[rows] by operation(images[rows], *parameters), in place; on the CPU block by block.

    rows: int64 [R], on the CPU. parameters: [R, ...], a row for each image.
    """
    block = max(1, _BLOCK_BYTES // images.shape[1:].numel()) if images.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        at = rows[part].to(images.device, non_blocking=True)
        _put(images, at, operation(images.index_select(0, at), *(values[part] for values in parameters)))


def _put(images: Tensor, at: Tensor, changed: Tensor) -> None:
    if images.device.type == "cpu":
        images.numpy()[at.numpy()] = changed.numpy()  # whole images at once; torch's copy takes many times as long
    else:
        images.index_copy_(0, at, changed)


def replaced(images: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Images [B, C, H, W] with the others, uint8 [n, C, H, W], in place of the `rows`, int64 [n], on the CPU."""
    at = torch.arange(len(images))
    at[rows] = torch.arange(len(images), len(images) + len(rows))
    # as index_copy, which takes ten times as long for bytes
    return torch.cat([images, others]).index_select(0, at.to(images.device, non_blocking=True))
