"""Color operations: ColorJitter and RandomGrayscale, in 16-bit fixed point.

Functions take a factor for each image, float64 [B] on the CPU, and return the same bits on every device.
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.views.ops.fields import Ascending, KeepsSize, Probability
from kdpipe.stages.views.ops.rows import apply_to_rows
from kdpipe.stages.views.rng import CounterRNG

FRACTION_BITS = 16
ONE = 1 << FRACTION_BITS
"""Fixed point: integers in units of 1 / ONE."""

_RED, _GREEN, _BLUE = 19589, 38470, 7471
"""torchvision's luma weights 0.2989, 0.587 and 0.114, whose sum is slightly below 1 there as well."""

_ORDERS = torch.tensor(list(permutations(range(4))))
_ORDER, _FACTOR = 0, 1


_Factor = Annotated[float, Field(ge=0, le=10)]
_Turns = Annotated[float, Field(ge=-0.5, le=0.5)]
Factors = _Factor | Annotated[tuple[_Factor, _Factor], Ascending]
HueShift = Annotated[float, Field(ge=0, le=0.5)] | Annotated[tuple[_Turns, _Turns], Ascending]


@section
class ColorJitter(KeepsSize):
    """Change brightness, contrast, saturation and hue by random factors, in an order drawn for each image.

    Same as torchvision's, within 1 gray level for each of the four steps. An amount of 0 is off;
    amounts are at most 10.

    Attributes:
        brightness: An amount a, for factors in [max(0, 1 - a), 1 + a), or [low, high].
        contrast: As brightness.
        saturation: As brightness.
        hue: An amount h, at most 0.5, for a shift in [-h, h) of the color circle, or [low, high].
    """

    name: Literal["ColorJitter"]
    brightness: Factors = 0.0
    contrast: Factors = 0.0
    saturation: Factors = 0.0
    hue: HueShift = 0.0

    @property
    def is_identity(self) -> bool:
        return not self._active()

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        changed = images.clone()
        orders = _ORDERS[rng.integers(len(_ORDERS), _ORDER)]
        factors = [rng.uniform(*bounds, _FACTOR + number) for number, bounds in enumerate(self._bounds())]
        active = self._active()
        for step in range(len(_ADJUST)):
            for number in active:
                rows = (orders[:, step] == number).nonzero()[:, 0]
                apply_to_rows(changed, rows, _ADJUST[number], factors[number][rows])
        return changed

    def _active(self) -> list[int]:
        """Return the numbers of the factors that are not off."""
        return [number for number, bounds in enumerate(self._bounds()) if bounds != (_NEUTRAL[number],) * 2]

    def _bounds(self) -> list[tuple[float, float]]:
        """Return [low, high) of the four factors; factors from an amount are not below 0."""
        amounts = [self.brightness, self.contrast, self.saturation, self.hue]
        return [
            amount if isinstance(amount, tuple) else (max(neutral - amount, neutral - 1.0), neutral + amount)
            for amount, neutral in zip(amounts, _NEUTRAL, strict=True)
        ]


@section
class RandomGrayscale(KeepsSize):
    """Convert RGB to gray in all three channels with probability `p`, as torchvision."""

    name: Literal["RandomGrayscale"]
    p: Probability = 0.1

    @property
    def is_identity(self) -> bool:
        return self.p == 0

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        changed = images.clone()
        apply_to_rows(changed, rng.bernoulli(self.p, 0).nonzero()[:, 0], rgb_to_grayscale)
        return changed


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Return images * factor, uint8 [B, C, H, W]; factors in [0, 64], as for all blending functions."""
    return _rounded_down(images.int().mul_(fixed_point(factors, images.device)))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Return images * factor + their mean gray level * (1 - factor), uint8 [B, C, H, W]."""
    factor = fixed_point(factors, images.device)
    gray = grayscale(images)
    share = (ONE - factor) * gray.sum((1, 2, 3), keepdim=True)  # int64: exact in any order
    return _rounded_down(images.int().mul_(factor).add_((share // gray.shape[1:].numel()).int()))


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Return images * factor + their gray * (1 - factor), uint8 [B, C, H, W]; images that are not RGB are unchanged."""
    return blend(images, grayscale(images), factors) if images.shape[1] == 3 else images


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` of the color circle, float64 [B], at fixed HSV saturation and value.

    A turn of 1/3 makes red green. Images that are not RGB are unchanged. Needs no division: angles are multiplied by
    the chroma (largest minus smallest channel), so that a sixth of the circle is one chroma.
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
    """Return the shift from an angle to that from the peak of each channel: fixed-point sixths, int32 [3, B].

    Whole thirds of a circle only permute the channels; the rest of a turn is at most a sixth, which keeps all
    differences of angles within one circle.
    """
    sixths = (turns * (6 * ONE)).round().remainder(6 * ONE).long()
    thirds = (sixths + ONE) // (2 * ONE)
    place = (torch.arange(3)[:, None] - thirds) % 3
    return (sixths - 2 * ONE * thirds - 2 * ONE * place).int()


def _angle(images: Tensor, high: Tensor, chroma: Tensor) -> Tensor:
    """Return sixths of the color circle from red, -1 to 5, times the chroma: int32 [B, H, W]."""
    red, green, blue = images.int().unbind(1)
    is_red = high == images[:, 0]
    is_green = (high == images[:, 1]) & ~is_red
    # products: torch.where is many times slower
    angle = (green - blue).mul_(is_red)
    angle.add_((blue - red).add_(chroma, alpha=2).mul_(is_green))
    return angle.add_((red - green).add_(chroma, alpha=4).mul_(~(is_red | is_green)))


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Return the gray of RGB in all three channels, uint8 [B, C, H, W]; images that are not RGB are unchanged."""
    return grayscale(images).to(torch.uint8).expand(images.shape) if images.shape[1] == 3 else images


def grayscale(images: Tensor) -> Tensor:
    """Return the gray of RGB, rounded down, int32 [B, 1, H, W]; other images as int32 [B, C, H, W]."""
    if images.shape[1] != 3:
        return images.int()
    gray = images[:, 0].int().mul_(_RED)
    gray.add_(images[:, 1].int().mul_(_GREEN)).add_(images[:, 2].int().mul_(_BLUE))
    return gray.bitwise_right_shift_(FRACTION_BITS)[:, None]


def blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Return images * factor + others * (1 - factor), rounded down and clamped: uint8 [B, C, H, W].

    Others are int32 [B, C or 1, H, W], 0 to 255; factors float64 [B], 0 to 64, so that products fit into 32 bits.
    """
    factor = fixed_point(factors, images.device)
    return _rounded_down(images.int().mul_(factor).add_(others * (ONE - factor)))


def fixed_point(factors: Tensor, device: torch.device) -> Tensor:
    """Convert factors float64 [B], on the CPU, to int32 [B, 1, 1, 1] on `device`."""
    return (factors * ONE).round().int().to(device, non_blocking=True)[:, None, None, None]


def _rounded_down(products: Tensor) -> Tensor:
    """Convert fixed point to gray levels, as torchvision casts them; overwrites `products`, int32."""
    return products.bitwise_right_shift_(FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
"""The factors of the identity."""
