"""RandomResizedCrop: a box of random area and shape, resized; the crop that networks on ImageNet are trained with."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor

from stages.config import section
from stages.errors import RecipeError
from stages.views.draw import Draw
from stages.views.resample import Boxes, resample

_TOP, _LEFT, _AREA, _SHAPE = 0, 1, 2, 3
"""Parameters of a box; each further try draws area and shape from two numbers further on."""

_NUM_TRIES = 10
NUM_BOX_PARAMETERS = 2 + 2 * _NUM_TRIES
"""Random numbers that `random_boxes` takes, from 0 on."""

_NUM_SHAPES = 4096


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the lowest comes first")
    return ends


def or_say(wanted: str) -> WrapValidator:
    """Refuse with one sentence what is no member of a union: pydantic has one for each member."""

    def validated(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(tuple(value) if isinstance(value, list) else value)  # recipes have lists, for want of tuples
        except ValidationError as error:
            raise ValueError(f"wanted is {wanted}") from error

    return WrapValidator(validated)


Share = Annotated[float, Field(ge=0, le=1)]
AreaRange = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
"""The least and the largest area of a box, as shares of the picture's."""

Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
RatioRange = Annotated[tuple[Ratio, Ratio], AfterValidator(_ascending)]

Side = Annotated[int, Field(ge=1, le=2**14)]


@section
class RandomResizedCrop:
    """A box of random area and shape in the picture, resized to `size` (Szegedy et al. 2015, arXiv 1409.4842).

    size: one side, (H, W), or none for the picture's own size.
    scale: the least and the largest area of the box, as shares of the picture's.
    ratio: the least and the largest width over height of the box; between them its logarithm is uniform.

    torchvision's, bilinear, but without antialiasing, which matters only where a box is larger than `size`.
    """

    name: Literal["RandomResizedCrop"]
    size: Annotated[Side | tuple[Side, Side] | None, or_say("one side or [height, width], 1 to 16384")] = None
    scale: AreaRange = (0.08, 1.0)
    ratio: RatioRange = (3 / 4, 4 / 3)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the views. Raises RecipeError where pictures of `size` would shrink to less than half."""
        out = self._wanted(size)
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
        return resample(images, boxes, self._wanted(size))

    def _wanted(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.size is None:
            return size
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def random_boxes(
    draw: Draw, size: tuple[int, int], most: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Boxes anywhere in pictures of `size` (H, W), with areas and widths over heights within `scale` and `ratio`.

    As torchvision draws them: of ten tries the first that gives a box of 1 x 1 to `most` (h, w); after ten in vain
    the box is 0 x 0.
    """
    heights, widths = torch.zeros(2, len(draw.sample_ids), dtype=torch.int64)
    waiting = torch.arange(len(draw.sample_ids))
    for number in range(_NUM_TRIES):
        if not len(waiting):
            break
        tried = _sides(draw.at(waiting), size[0] * size[1], scale, ratio, 2 * number)
        fits = (tried >= 1).all(0) & (tried <= torch.tensor(most)[:, None]).all(0)
        heights[waiting[fits]], widths[waiting[fits]] = tried[:, fits]
        waiting = waiting[~fits]
    return Boxes(up_to(draw, size[0] - heights, _TOP), up_to(draw, size[1] - widths, _LEFT), heights, widths)


def up_to(draw: Draw, most: Tensor, parameter: int) -> Tensor:
    """Integers from 0 to `most`, int64 [B], below 2^31, which each sample has its own of: int64 [B]."""
    return (draw.below(2**31, parameter) * (most + 1)) >> 31


def _sides(draw: Draw, picture_area: int, scale: tuple[float, float], ratio: tuple[float, float], first: int) -> Tensor:
    """Height and width of a box, int64 [2, B], which may be too large for the picture, or nothing."""
    areas = picture_area * draw.uniform(*scale, first + _AREA)
    ratios = _ratios(*ratio)[draw.below(_NUM_SHAPES, first + _SHAPE)]
    return torch.stack([areas / ratios, areas * ratios]).sqrt_().round_().to(torch.int64)


@lru_cache
def _ratios(low: float, high: float) -> Tensor:
    """Numbers evenly spaced from `low` to `high` on a logarithmic scale, float64 [_NUM_SHAPES].

    A table, since the last bits of exp depend on the machine, and within a tensor on the place: made of Python's,
    rounded to what survives that, it gives each sample the same box everywhere.
    """
    step = math.log(high / low) / _NUM_SHAPES
    shares = [low * math.exp(step * (number + 0.5)) for number in range(_NUM_SHAPES)]
    return torch.tensor([round(share * 2**24) / 2**24 for share in shares], dtype=torch.float64)


def _central_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height, width of the largest central box whose width over height lies within `ratio`."""
    height, width = size
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
