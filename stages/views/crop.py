"""RandomCrop: a picture padded on every side and cut to its old size somewhere."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.errors import RecipeError
from stages.views.arguments import Level
from stages.views.draw import Draw

_DOWN, _RIGHT = 0, 1


@section
class RandomCrop:
    """Pad by `padding` pixels of `fill` on every side, then take a crop of the original size at random.

    torchvision's, at the size of the picture: another size is RandomResizedCrop's.
    """

    name: Literal["RandomCrop"]
    padding: Annotated[int, Field(ge=0, le=1024)] = 0
    fill: Level = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W), unchanged. Raises RecipeError where the crop could miss the picture altogether."""
        if self.padding >= min(size):
            raise RecipeError(
                f"RandomCrop with padding = {self.padding} could crop images of {size[0]} x {size[1]} to nothing: keep "
                "it below both."
            )
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        tops, lefts = (draw.below(2 * self.padding + 1, parameter) for parameter in (_DOWN, _RIGHT))
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        return windows(padded, tops, lefts, (images.shape[2], images.shape[3]))


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
