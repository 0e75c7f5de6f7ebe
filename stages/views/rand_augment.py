"""RandAugment and TrivialAugmentWide: operations drawn for each image from torchvision's space of fourteen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.config import section
from stages.views.affine import rotate, shear_x, shear_y, translate_x, translate_y
from stages.views.arguments import Level
from stages.views.colour import adjust_brightness, adjust_contrast, adjust_saturation
from stages.views.draw import Draw
from stages.views.rows import on_rows
from stages.views.tone import adjust_sharpness, autocontrast, equalize, posterize, solarize

_OPERATION, _SIGN, _BIN, _NUM_PARAMETERS = 0, 1, 2, 3
"""The parameters of one step; the next step's follow. A stream has 256 numbers: enough for 64 steps."""

NumBins = Annotated[int, Field(ge=2, le=1000)]


@section
class RandAugment:
    """Change each image by `num_ops` operations one after the other, each drawn from fourteen, the identity among them.

    num_ops: at most 64. magnitude: how strong, from 0 to num_magnitude_bins - 1; nine of them draw its sign too.
    fill: what comes in from outside of the image where one is rotated, moved or sheared.
    torchvision's, with "nearest" as the only interpolation and one fill for all channels. Geometry: see RandomAffine.
    Cubuk et al. 2020, "RandAugment: practical automated data augmentation with a reduced search space" (1909.13719).
    """

    name: Literal["RandAugment"]
    num_ops: Annotated[int, Field(ge=0, le=64)] = 2
    magnitude: Annotated[int, Field(ge=0)] = 9
    num_magnitude_bins: NumBins = 31
    interpolation: Literal["nearest"] = "nearest"
    fill: Level = 0

    @model_validator(mode="after")
    def _magnitude_has_a_bin(self) -> RandAugment:
        if self.magnitude >= self.num_magnitude_bins:
            raise ValueError(
                f"magnitude = {self.magnitude}, but num_magnitude_bins = {self.num_magnitude_bins} end at "
                f"{self.num_magnitude_bins - 1}: lower the one or raise the other"
            )
        return self

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        changed = images.clone()
        height, width = images.shape[2:]
        largest = _RAND_AUGMENT | {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height}
        strengths = _Strengths(torch.full((len(images),), self.magnitude), self.num_magnitude_bins - 1, largest)
        for step in range(self.num_ops):
            _change(changed, draw, step * _NUM_PARAMETERS, strengths, self.fill)
        return changed


@section
class TrivialAugmentWide:
    """Change each image by one operation, drawn from fourteen, as strongly as is drawn too.

    num_magnitude_bins: how many strengths there are. fill: what comes in from outside of the image.
    torchvision's, with "nearest" as the only interpolation and one fill for all channels. Geometry: see RandomAffine.
    Magnitudes are exact: bin 15 of 31 moves by 16 pixels, where torchvision's float32 may cut 15.99 down to 15.
    Müller and Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation" (2103.10158).
    """

    name: Literal["TrivialAugmentWide"]
    num_magnitude_bins: NumBins = 31
    interpolation: Literal["nearest"] = "nearest"
    fill: Level = 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        changed = images.clone()
        bins = draw.below(self.num_magnitude_bins, _BIN)
        _change(changed, draw, 0, _Strengths(bins, self.num_magnitude_bins - 1, _TRIVIAL_AUGMENT_WIDE), self.fill)
        return changed


@dataclass(frozen=True)
class _Strengths:
    """How strongly to change each image: bin bins[b], int64 [B], of 0 ... `last`; `last` is the `largest` magnitude."""

    bins: Tensor
    last: int
    largest: Mapping[str, float]

    def of(self, operation: str, rows: Tensor) -> Tensor:
        """Magnitudes float64 [R], without a sign."""
        return self.largest[operation] * self.bins[rows].double() / self.last


def _change(images: Tensor, draw: Draw, first: int, strengths: _Strengths, fill: int) -> None:
    """One step, in place: an operation for each image, called once for all that drew it; `first` numbers parameters."""
    chosen = draw.below(len(_OPERATIONS), first + _OPERATION)
    signs = 1.0 - 2.0 * draw.chance(0.5, first + _SIGN).double()
    for number, (name, function) in enumerate(_OPERATIONS.items()):
        rows = (chosen == number).nonzero()[:, 0]
        if function is not None and len(rows):
            magnitudes = strengths.of(name, rows) * (signs[rows] if name in _SIGNED else 1.0)
            on_rows(images, rows, partial(function, fill), magnitudes)


_OPERATIONS: dict[str, Callable[[int, Tensor, Tensor], Tensor] | None] = {
    "Identity": None,
    "ShearX": lambda fill, images, slopes: shear_x(images, slopes, fill),
    "ShearY": lambda fill, images, slopes: shear_y(images, slopes, fill),
    "TranslateX": lambda fill, images, pixels: translate_x(images, pixels.trunc(), fill),
    "TranslateY": lambda fill, images, pixels: translate_y(images, pixels.trunc(), fill),
    "Rotate": lambda fill, images, degrees: rotate(images, degrees, fill),
    "Brightness": lambda _, images, change: adjust_brightness(images, 1 + change),
    "Color": lambda _, images, change: adjust_saturation(images, 1 + change),
    "Contrast": lambda _, images, change: adjust_contrast(images, 1 + change),
    "Sharpness": lambda _, images, change: adjust_sharpness(images, 1 + change),
    "Posterize": lambda _, images, lost_bits: posterize(images, (8 - lost_bits).round().long()),
    "Solarize": lambda _, images, inverted_levels: solarize(images, 255 - inverted_levels),
    "AutoContrast": lambda _, images, __: autocontrast(images),
    "Equalize": lambda _, images, __: equalize(images),
}
"""(fill, images, magnitudes float64 [B]) to images, in torchvision's order: a drawn number is a place in it."""

_SHEARS, _MOVES = ("ShearX", "ShearY"), ("TranslateX", "TranslateY")
_COLOURS = ("Brightness", "Color", "Contrast", "Sharpness")
_SIGNED = {*_SHEARS, *_MOVES, "Rotate", *_COLOURS}

_COMMON = {"Solarize": 255.0, "AutoContrast": 0.0, "Equalize": 0.0}
_RAND_AUGMENT = (
    {"Rotate": 30.0, "Posterize": 4.0} | dict.fromkeys(_SHEARS, 0.3) | dict.fromkeys(_COLOURS, 0.9) | _COMMON
)
_TRIVIAL_AUGMENT_WIDE = (
    {"Rotate": 135.0, "Posterize": 6.0}
    | dict.fromkeys((*_SHEARS, *_COLOURS), 0.99)
    | dict.fromkeys(_MOVES, 32.0)
    | _COMMON
)
"""The largest magnitudes: degrees, bits lost, slopes, pixels, factors beyond 1, levels inverted. RandAugment's moves
depend on the size of the image."""
