"""RandomResizedCrop: a box of random area and shape, resized; the crop that networks on ImageNet are trained with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stages.config import section
from stages.errors import RecipeError
from stages.views.arguments import AreaRange, RatioRange, Size, side_lengths
from stages.views.boxes import Boxes, random_boxes
from stages.views.draw import Draw
from stages.views.resample import resample


@section
class RandomResizedCrop:
    """A box of random area and shape in the picture, resized to `size` (Szegedy et al. 2015, arXiv 1409.4842).

    size: one side, (H, W), or none for the picture's own size.
    scale: the least and the largest area of the box, as shares of the picture's.
    ratio: the least and the largest width over height of the box; between them its logarithm is uniform.

    torchvision's, bilinear, but without antialiasing, which matters only where a box is larger than `size`.
    """

    name: Literal["RandomResizedCrop"]
    size: Size = None
    scale: AreaRange = (0.08, 1.0)
    ratio: RatioRange = (3 / 4, 4 / 3)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the views. Raises RecipeError where pictures of `size` would shrink to less than half."""
        out = side_lengths(self.size, size)
        if 2 * out[0] < size[0] or 2 * out[1] < size[1]:
            raise RecipeError(
                f"RandomResizedCrop with size = {out[0]} x {out[1]} would shrink images of {size[0]} x {size[1]} to "
                f"less than half, and alias: have them smaller with data.image_size = {2 * min(out)} or less."
            )
        return out

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H', W']."""
        size = (images.shape[2], images.shape[3])
        boxes = random_boxes(draw, size, size, self.scale, self.ratio)
        central = (torch.tensor(side) for side in _central_box(size, self.ratio))
        found = boxes.heights > 0
        boxes = Boxes(*(torch.where(found, drawn, fixed) for drawn, fixed in zip(boxes, central, strict=True)))
        return resample(images, boxes, side_lengths(self.size, size))


def _central_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height, width of the largest central box whose width over height lies within `ratio`."""
    height, width = size
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
