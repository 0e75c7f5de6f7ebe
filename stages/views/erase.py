"""RandomErasing and Cutout: a box of every picture painted over."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.errors import RecipeError
from stages.views.arguments import AreaRange, Level, Probability, RatioRange, or_say
from stages.views.boxes import NUM_BOX_PARAMETERS, boxes_around, pasted, random_boxes
from stages.views.draw import Draw
from stages.views.rows import replaced

_CHOSEN, _KEY, _SECOND_KEY = NUM_BOX_PARAMETERS, NUM_BOX_PARAMETERS + 1, NUM_BOX_PARAMETERS + 2
_ROW, _COLUMN = 0, 1

Paint = Level | tuple[Level, Level, Level] | Literal["random"]


@section
class RandomErasing:
    """With probability `p` paint over a box of random area and shape (Zhong et al. 2017, arXiv 1708.04896).

    scale: the least and the largest area of the box, as shares of the picture's.
    ratio: the least and the largest height over width of the box.
    value: a grey level, one for each of red, green and blue, or "random": noise, every level as likely for each pixel.

    torchvision's, but for the noise: its own is normal, meant for images that are normalised already, and views are
    not. A box that ten tries could not place, or without a pixel, erases nothing.
    """

    name: Literal["RandomErasing"]
    p: Probability = 0.5
    scale: AreaRange = (0.02, 0.33)
    ratio: RatioRange = (0.3, 3.3)
    value: Annotated[Paint, or_say('a level from 0 to 255, [red, green, blue], or "random"')] = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W), unchanged."""
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]. Raises RecipeError for grey images and a value of three."""
        rows = draw.chance(self.p, _CHOSEN).nonzero()[:, 0]
        drawn = draw.at(rows)
        size = (images.shape[2], images.shape[3])
        flipped = (1 / self.ratio[1], 1 / self.ratio[0])  # that of a box is width over height
        boxes = random_boxes(drawn, size, (size[0] - 1, size[1] - 1), self.scale, flipped)
        chosen = images.index_select(0, rows.to(images.device, non_blocking=True))
        return replaced(images, rows, pasted(chosen, self._paint(chosen, drawn), boxes))

    def _paint(self, images: Tensor, draw: Draw) -> Tensor:
        """What to paint with: uint8, of the shape of images [B, C, H, W] or expanding to it."""
        if self.value == "random":
            keys = (draw.below(2**31, _KEY) << 31) + draw.below(2**31, _SECOND_KEY)
            return noise(keys.to(images.device, non_blocking=True), (images.shape[1], images.shape[2], images.shape[3]))
        if isinstance(self.value, tuple) and images.shape[1] != len(self.value):
            raise RecipeError(
                f"RandomErasing with value = {list(self.value)} is meant for images of 3 channels, and these have "
                f"{images.shape[1]}: give it a single value."
            )
        return torch.tensor(self.value, dtype=torch.uint8, device=images.device).reshape(-1, 1, 1)


@section
class Cutout:
    """Paint a square of `size` pixels centred anywhere in the picture, cut off at its border (DeVries & Taylor 2017).

    arXiv 1708.04552. Not among torchvision's.
    """

    name: Literal["Cutout"]
    size: Annotated[int, Field(ge=1, le=2**14)]
    fill: Level = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W), unchanged. Raises RecipeError where the square could cover the picture altogether."""
        if self.size >= max(size):
            raise RecipeError(
                f"Cutout with size = {self.size} could paint over all of an image of {size[0]} x {size[1]}: keep it "
                f"below {max(size)}."
            )
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        height, width = images.shape[2:]
        side = torch.full((len(images),), self.size)
        boxes = boxes_around(draw.below(height, _ROW), draw.below(width, _COLUMN), side, side, (height, width))
        return pasted(images, torch.tensor(self.fill, dtype=torch.uint8, device=images.device), boxes)


def noise(keys: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bytes that look random, and depend on their sample's key, int64 [B], and their place: uint8 [B, *shape].

    Eight at a time: number w is SplitMix64's w-th (Steele, Lea, Flood 2014), the key being its seed.
    """
    num_bytes = shape[0] * shape[1] * shape[2]
    words = torch.arange(1, (num_bytes + 7) // 8 + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    x = keys[:, None] + words
    x = _fold(x, 30).mul_(_signed(0xBF58476D1CE4E5B9))
    x = _fold(x, 27).mul_(_signed(0x94D049BB133111EB))
    return _fold(x, 31).view(torch.uint8)[:, :num_bytes].reshape(-1, *shape)


def _fold(x: Tensor, by: int) -> Tensor:
    """x ^ (x >> by) of int64 in place, with zeros shifted in: torch's own shift copies the sign."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (64 - by)) - 1))


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return x - 2**64 if x >= 2**63 else x
