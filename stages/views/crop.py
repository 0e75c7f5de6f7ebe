"""RandomCrop: a picture padded on every side, and a crop of it."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.errors import RecipeError
from stages.views.arguments import Level, Size, side_lengths
from stages.views.draw import Draw

_DOWN, _RIGHT = 0, 1


@section
class RandomCrop:
    """Pad by `padding` pixels of `fill` on every side, then take a crop of `size` at random.

    size: one side, (H, W), or none for the picture's own size. torchvision's.
    """

    name: Literal["RandomCrop"]
    size: Size = None
    padding: Annotated[int, Field(ge=0, le=1024)] = 0
    fill: Level = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the views. Raises RecipeError where the crop is larger than the padded picture, or could miss the
        picture altogether.
        """
        out = side_lengths(self.size, size)
        if any(side > old + 2 * self.padding for side, old in zip(out, size, strict=True)):
            raise RecipeError(
                f"RandomCrop to {out[0]} x {out[1]} with padding = {self.padding} is larger than images of {size[0]} x "
                f"{size[1]}: give it a smaller size, or more padding."
            )
        if self.padding >= min(out):
            raise RecipeError(
                f"RandomCrop with padding = {self.padding} could crop images of {size[0]} x {size[1]} to nothing: keep "
                f"it below {min(out)}."
            )
        return out

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H', W']."""
        height, width = side_lengths(self.size, (images.shape[2], images.shape[3]))
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        tops = draw.below(padded.shape[2] - height + 1, _DOWN)
        lefts = draw.below(padded.shape[3] - width + 1, _RIGHT)
        return windows(padded, tops, lefts, (height, width))


def windows(images: Tensor, tops: Tensor, lefts: Tensor, size: tuple[int, int]) -> Tensor:
    """The window of `size` (h, w) at row tops[b], column lefts[b] of each image: [B, C, H, W] to [B, C, h, w].

    tops, lefts: int64 [B], on the CPU, such that each window lies within its image.
    """
    if images.device.type == "cpu":
        # numpy copies whole windows; torch's indexing and gathering of bytes take many times as long
        every = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, axis=(2, 3))
        return torch.from_numpy(every[np.arange(len(images)), :, tops.numpy(), lefts.numpy()])
    batch, channels, _, width = images.shape
    tops, lefts = tops.to(images.device, non_blocking=True), lefts.to(images.device, non_blocking=True)
    rows = tops[:, None] + torch.arange(size[0], device=images.device)
    columns = lefts[:, None] + torch.arange(size[1], device=images.device)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1).expand(batch, channels, -1)
    return images.reshape(batch, channels, -1).gather(2, index).reshape(batch, channels, *size)
