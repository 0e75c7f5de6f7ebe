"""RandomResizedCrop: the usual crop of ImageNet training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.ops.boxes import Boxes, random_boxes
from kdpipe.stages.views.ops.fields import AreaRange, RatioRange, Size, side_lengths
from kdpipe.stages.views.ops.resample import resample
from kdpipe.stages.views.rng import CounterRNG


@section
class RandomResizedCrop:
    """Crop a box of random area and shape and resize it to `size` (Szegedy et al. 2015, arXiv 1409.4842).

    Same as torchvision's, bilinear, but without antialiasing, which matters only if a box is larger than `size`.

    Attributes:
        size: One side, (H, W), or None for the image's own size.
        scale: Minimum and maximum area of the box, as fractions of the image's.
        ratio: Minimum and maximum width over height of the box, log-uniform in between.
    """

    name: Literal["RandomResizedCrop"]
    size: Size = None
    scale: AreaRange = (0.08, 1.0)
    ratio: RatioRange = (3 / 4, 4 / 3)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the crops. Raises RecipeError if images of `size` would shrink to less than half."""
        out = side_lengths(self.size, size)
        if 2 * out[0] < size[0] or 2 * out[1] < size[1]:
            raise RecipeError(
                f"RandomResizedCrop with size = {out[0]} x {out[1]} would shrink images of {size[0]} x {size[1]} to "
                f"less than half, and alias: set data.image_size = {2 * min(out)} or less."
            )
        return out

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Crop and resize uint8 [B, C, H, W] to uint8 [B, C, H', W']."""
        size = (images.shape[2], images.shape[3])
        boxes = random_boxes(rng, size, size, self.scale, self.ratio)
        central = (torch.tensor(side) for side in _central_box(size, self.ratio))
        found = boxes.heights > 0
        boxes = Boxes(*(torch.where(found, drawn, fixed) for drawn, fixed in zip(boxes, central, strict=True)))
        return resample(images, boxes, side_lengths(self.size, size))


def _central_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, left, height, width of the largest central box with width over height within `ratio`."""
    height, width = size
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
