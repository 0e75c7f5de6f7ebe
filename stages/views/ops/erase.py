"""RandomErasing and Cutout: fill a box in every image."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.faults import with_message
from kdpipe.stages.views.ops.boxes import NUM_BOX_PARAMETERS, boxes_around, paste, random_boxes
from kdpipe.stages.views.ops.fields import AreaRange, KeepsSize, Level, Probability, RatioRange
from kdpipe.stages.views.ops.rows import replace_rows
from kdpipe.stages.views.rng import GOLDEN, CounterRNG, splitmix64

_CHOSEN, _KEY, _SECOND_KEY = NUM_BOX_PARAMETERS, NUM_BOX_PARAMETERS + 1, NUM_BOX_PARAMETERS + 2
_ROW, _COLUMN = 0, 1

Fill = Level | tuple[Level, Level, Level] | Literal["random"]


@section
class RandomErasing(KeepsSize):
    """Erase a box of random area and shape with probability `p` (Zhong et al. 2017, arXiv 1708.04896).

    Same as torchvision's except for the noise, which is normal there (for normalized images; views are not). A box that
    ten tries could not place, or of less than a pixel, erases nothing.

    Attributes:
        scale: Minimum and maximum area of the box, as fractions of the image's.
        ratio: Minimum and maximum height over width of the box.
        value: A gray level, one for each of red, green and blue, or "random": uniform noise for each pixel.
    """

    name: Literal["RandomErasing"]
    p: Probability = 0.5
    scale: AreaRange = (0.02, 0.33)
    ratio: RatioRange = (0.3, 3.3)
    value: Annotated[Fill, with_message('a level from 0 to 255, [red, green, blue], or "random"')] = 0

    @property
    def is_identity(self) -> bool:
        return self.p == 0

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        rows = rng.bernoulli(self.p, _CHOSEN).nonzero()[:, 0]
        row_rng = rng.at(rows)
        size = (images.shape[2], images.shape[3])
        flipped = (1 / self.ratio[1], 1 / self.ratio[0])  # random_boxes takes width over height
        boxes = random_boxes(row_rng, size, (size[0] - 1, size[1] - 1), self.scale, flipped)
        chosen = images.index_select(0, rows.to(images.device, non_blocking=True))
        return replace_rows(images, rows, paste(chosen, self._fill(chosen, row_rng), boxes))

    def _fill(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Return the fill as uint8, broadcastable to images [B, C, H, W]."""
        if self.value == "random":
            keys = (rng.integers(2**31, _KEY) << 31) + rng.integers(2**31, _SECOND_KEY)
            return noise(keys.to(images.device, non_blocking=True), (images.shape[1], images.shape[2], images.shape[3]))
        if isinstance(self.value, tuple) and images.shape[1] != len(self.value):
            raise RecipeError(
                f"RandomErasing with value = {list(self.value)} needs images of 3 channels, and these have "
                f"{images.shape[1]}: give it a single value."
            )
        return torch.tensor(self.value, dtype=torch.uint8).to(images.device, non_blocking=True).reshape(-1, 1, 1)


@section
class Cutout:
    """Fill a square of `size` pixels centered anywhere in the image, clipped at its border.

    DeVries and Taylor 2017, arXiv 1708.04552. Not in torchvision.
    """

    name: Literal["Cutout"]
    size: Annotated[int, Field(ge=1, le=2**14)]
    fill: Level = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W), unchanged. Raises RecipeError if the square could cover the whole image."""
        if self.size >= max(size):
            raise RecipeError(
                f"Cutout with size = {self.size} could cover all of an image of {size[0]} x {size[1]}: keep it "
                f"below {max(size)}."
            )
        return size

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        height, width = images.shape[2:]
        side = torch.full((len(images),), self.size)
        boxes = boxes_around(rng.integers(height, _ROW), rng.integers(width, _COLUMN), side, side, (height, width))
        return paste(images, images.new_full((), self.fill), boxes)


def noise(keys: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return pseudo-random bytes that depend on each sample's key, int64 [B], and their place: uint8 [B, *shape].

    Eight at a time: word w is the w-th of SplitMix64 (Steele, Lea, Flood 2014) seeded by the key.
    """
    num_bytes = shape[0] * shape[1] * shape[2]
    counters = torch.arange(1, (num_bytes + 7) // 8 + 1, device=keys.device) * GOLDEN
    return splitmix64(keys[:, None] + counters).view(torch.uint8)[:, :num_bytes].reshape(-1, *shape)
