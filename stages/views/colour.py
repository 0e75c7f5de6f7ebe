"""Colour: ColorJitter and RandomGrayscale, and the functions they call, in 16-bit fixed point.

The functions take a factor for each image, float64 [B] on the CPU, and give the same bits on every device.
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.views.arguments import Ascending, Probability
from stages.views.draw import Draw
from stages.views.rows import on_rows

FRACTION_BITS = 16
ONE = 1 << FRACTION_BITS
"""Fixed point: integers in units of 1 / ONE."""

_RED, _GREEN, _BLUE = 19589, 38470, 7471
"""torchvision's weights of grey, 0.2989, 0.587 and 0.114: they add up to a little less than 1, there as here."""

_ORDERS = torch.tensor(list(permutations(range(4))))
_ORDER, _FACTOR = 0, 1


_Factor = Annotated[float, Field(ge=0, le=10)]
_Turns = Annotated[float, Field(ge=-0.5, le=0.5)]
Factors = _Factor | Annotated[tuple[_Factor, _Factor], Ascending]
HueShift = Annotated[float, Field(ge=0, le=0.5)] | Annotated[tuple[_Turns, _Turns], Ascending]


@section
class ColorJitter:
    """Change brightness, contrast, saturation and hue by random factors, in an order drawn for each image.

    brightness, contrast, saturation: an amount a, for factors in [max(0, 1 - a), 1 + a), or [low, high].
    hue: an amount h, at most 0.5, for a shift in [-h, h) of the colour circle, or [low, high].
    An amount of 0 is off. torchvision's, whose numbers have no upper bound: here they are at most 10, and what is
    left out is 0 rather than None. Pixels may differ from torchvision's by 1 grey level at each of the four steps.
    """

    name: Literal["ColorJitter"]
    brightness: Factors = 0.0
    contrast: Factors = 0.0
    saturation: Factors = 0.0
    hue: HueShift = 0.0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        changed = images.clone()
        orders = _ORDERS[draw.below(len(_ORDERS), _ORDER)]
        factors = [draw.uniform(*bounds, _FACTOR + number) for number, bounds in enumerate(self._bounds())]
        active = [number for number, bounds in enumerate(self._bounds()) if bounds != (_NEUTRAL[number],) * 2]
        for step in range(len(_ADJUST)):
            for number in active:
                rows = (orders[:, step] == number).nonzero()[:, 0]
                on_rows(changed, rows, _ADJUST[number], factors[number][rows])
        return changed

    def _bounds(self) -> list[tuple[float, float]]:
        """Of the factors of the four, [low, high): at an amount no factor falls below 0."""
        amounts = [self.brightness, self.contrast, self.saturation, self.hue]
        return [
            amount if isinstance(amount, tuple) else (max(neutral - amount, neutral - 1.0), neutral + amount)
            for amount, neutral in zip(amounts, _NEUTRAL, strict=True)
        ]


@section
class RandomGrayscale:
    """Turn RGB into its grey, in all three channels, with probability `p`. torchvision's."""

    name: Literal["RandomGrayscale"]
    p: Probability = 0.1

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        changed = images.clone()
        on_rows(changed, draw.chance(self.p, 0).nonzero()[:, 0], rgb_to_grayscale)
        return changed


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """images * factor, uint8 [B, C, H, W]; factors in [0, 64], as for all functions here that blend."""
    return _rounded_down(images.int().mul_(fixed_point(factors, images.device)))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """images * factor + the mean of their grey * (1 - factor), uint8 [B, C, H, W]."""
    factor = fixed_point(factors, images.device)
    grey = grey_of(images)
    share = (ONE - factor) * grey.sum((1, 2, 3), keepdim=True)  # int64: exact, in whatever order it is summed
    return _rounded_down(images.int().mul_(factor).add_((share // grey.shape[1:].numel()).int()))


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """images * factor + their grey * (1 - factor), uint8 [B, C, H, W]; images not RGB stay as they are."""
    return blend(images, grey_of(images), factors) if images.shape[1] == 3 else images


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour circle by `turns` of it, at fixed HSV saturation and value: uint8 [B, C, H, W].

    turns: float64 [B]; 1/3 makes red green. Images not RGB stay as they are. Without a division: an angle is held
    as its product with the chroma (largest less smallest channel), so that a sixth of the circle is one chroma.
    """
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high.int() - torch.minimum(torch.minimum(red, green), blue)
    angle = _angle(images, high, chroma).mul_(ONE)
    least = high.int().mul_(ONE).sub_(chroma, alpha=2 * ONE).add_(ONE // 2)
    turned = torch.empty_like(images)
    for channel, shifts in enumerate(_shifts(turns)):
        from_peak = (chroma * shifts.to(images.device, non_blocking=True)[:, None, None]).add_(angle).abs_()
        from_trough = from_peak.sub_(chroma, alpha=3 * ONE).abs_()
        level = from_trough.clamp_(chroma * ONE, chroma * (2 * ONE)).add_(least)
        turned[:, channel] = level.bitwise_right_shift_(FRACTION_BITS)
    return turned


def _shifts(turns: Tensor) -> Tensor:
    """What takes an angle to that from the peak of each channel, at most one circle: fixed point sixths, int32 [3, B].

    Whole thirds of a circle only make the channels change places; what is left of a turn is a sixth at most, which
    keeps all differences of angles within one circle.
    """
    sixths = (turns * (6 * ONE)).round().remainder(6 * ONE).long()
    thirds = (sixths + ONE) // (2 * ONE)
    place = (torch.arange(3)[:, None] - thirds) % 3
    return (sixths - 2 * ONE * thirds - 2 * ONE * place).int()


def _angle(images: Tensor, high: Tensor, chroma: Tensor) -> Tensor:
    """Sixths of the colour circle from red, times the chroma, from -1 to 5: int32 [B, H, W]."""
    red, green, blue = images.int().unbind(1)
    is_red = high == images[:, 0]
    is_green = (high == images[:, 1]) & ~is_red
    # by products: torch.where chooses number by number, which takes many times as long
    angle = (green - blue).mul_(is_red)
    angle.add_((blue - red).add_(chroma, alpha=2).mul_(is_green))
    return angle.add_((red - green).add_(chroma, alpha=4).mul_(~(is_red | is_green)))


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """The grey of RGB in all three channels, uint8 [B, C, H, W]; images not RGB stay as they are."""
    return grey_of(images).to(torch.uint8).expand(images.shape) if images.shape[1] == 3 else images


def grey_of(images: Tensor) -> Tensor:
    """The grey of RGB, rounded down: int32 [B, 1, H, W]; of images not RGB themselves, int32 [B, C, H, W]."""
    if images.shape[1] != 3:
        return images.int()
    grey = images[:, 0].int().mul_(_RED)
    grey.add_(images[:, 1].int().mul_(_GREEN)).add_(images[:, 2].int().mul_(_BLUE))
    return grey.bitwise_right_shift_(FRACTION_BITS)[:, None]


def blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """images * factor + others * (1 - factor), rounded down and clamped: uint8 [B, C, H, W].

    others: int32 [B, C or 1, H, W], 0 to 255. factors: float64 [B], 0 to 64, so that 32 bits hold every product.
    """
    factor = fixed_point(factors, images.device)
    return _rounded_down(images.int().mul_(factor).add_(others * (ONE - factor)))


def fixed_point(factors: Tensor, device: torch.device) -> Tensor:
    """Factors float64 [B], on the CPU, as int32 [B, 1, 1, 1] on `device`."""
    return (factors * ONE).round().int().to(device, non_blocking=True)[:, None, None, None]


def _rounded_down(products: Tensor) -> Tensor:
    """Fixed point to grey levels, as torchvision casts them; `products` int32, overwritten."""
    return products.bitwise_right_shift_(FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
"""The factors that change nothing."""
