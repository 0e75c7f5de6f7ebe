"""RandomCrop: a picture padded on every side, and a crop of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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
        return self.pick(images, torch.arange(len(images)), draw)

    def pick(self, images: Tensor, rows: Tensor, draw: Draw) -> Tensor:
        """The same for the images at `rows`, int64 [B] on the CPU, of uint8 [N, C, H, W]: without a copy of them."""
        height, width = side_lengths(self.size, (images.shape[2], images.shape[3]))
        if images.device.type == "cpu" and (height, width) == images.shape[2:] and images.is_contiguous():
            below = 2 * self.padding + 1
            down, right = (draw.below(below, parameter) - self.padding for parameter in (_DOWN, _RIGHT))
            return shifted(images, rows, down, right, most=self.padding, fill=self.fill)
        images = images.index_select(0, rows.to(images.device, non_blocking=True))
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        tops = draw.below(padded.shape[2] - height + 1, _DOWN)
        lefts = draw.below(padded.shape[3] - width + 1, _RIGHT)
        return windows(padded, tops, lefts, (height, width))


def shifted(images: Tensor, rows: Tensor, down: Tensor, right: Tensor, *, most: int, fill: int) -> Tensor:
    """out[b, c, i, j] = images[rows[b], c, i + down[b], j + right[b]], `fill` where that lies outside its image.

    images: uint8 [N, C, H, W]; rows, down, right: int64 [B]; all on the CPU, the shifts at most `most` in size. The
    pixels of an image lie in one run of bytes, so that it is copied whole, from a place further on; what then comes
    from another row, plane or image is painted over. That takes a quarter of the time of copying, padding and cutting.
    """
    num_images, channels, height, width = images.shape
    image_bytes = channels * height * width
    last = (num_images - 1) * image_bytes
    starts = rows * image_bytes + down * width + right
    # Beyond the first and the last image there is nothing to copy: such runs are cut short below.
    pieces: NDArray[Any] = np.ndarray(last + 1, f"V{image_bytes}", images.numpy(), strides=(1,))
    moved = torch.from_numpy(pieces[starts.clamp(0, last).numpy()].view(np.uint8)).reshape(-1, *images.shape[1:])
    for at in ((starts < 0) | (starts > last)).nonzero()[:, 0].tolist():
        short, by = moved[at].view(-1), int(starts[at].clamp(0, last) - starts[at])
        short.copy_(short.roll(by))
    inside_rows = _places_within(height, most).index_select(0, down + most)
    inside_columns = _places_within(width, most).index_select(0, right + most)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    if not fill:
        return moved.bitwise_and_(inside)
    return moved.bitwise_xor_(fill).bitwise_and_(inside).bitwise_xor_(fill)


@lru_cache
def _places_within(num_places: int, most: int) -> Tensor:
    """For each shift from -most to most: 255 for places that it leaves within the image, 0 for others.

    uint8 [2 most + 1, num_places].
    """
    places = torch.arange(num_places) + torch.arange(-most, most + 1)[:, None]
    return ((places >= 0) & (places < num_places)).to(torch.uint8).mul_(255)


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
