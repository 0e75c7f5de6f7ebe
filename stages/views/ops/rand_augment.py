"""RandAugment and TrivialAugmentWide: draw from torchvision's fourteen operations for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.views.ops.affine import rotate, shear_x, shear_y, translate_x, translate_y
from kdpipe.stages.views.ops.color import adjust_brightness, adjust_contrast, adjust_saturation
from kdpipe.stages.views.ops.fields import KeepsSize, Level
from kdpipe.stages.views.ops.rows import apply_to_rows
from kdpipe.stages.views.ops.tone import adjust_sharpness, autocontrast, equalize, posterize, solarize
from kdpipe.stages.views.rng import CounterRNG

_OPERATION, _SIGN, _BIN, _NUM_PARAMETERS = 0, 1, 2, 3
"""The parameters of one step, followed by the next step's. A stream has 256 numbers: enough for 64 steps."""

NumBins = Annotated[int, Field(ge=2, le=1000)]


@section
class RandAugment(KeepsSize):
    """Apply `num_ops` operations in sequence, each drawn from fourteen, including the identity.

    Same as torchvision's, with nearest interpolation and one fill for all channels. Geometry: see RandomAffine.
    Cubuk et al. 2020, "RandAugment: practical automated data augmentation with a reduced search space" (1909.13719).

    Attributes:
        num_ops: At most 64.
        magnitude: Strength from 0 to num_magnitude_bins - 1; nine of the operations draw its sign too.
        fill: Gray level outside the image.
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
                f"magnitude = {self.magnitude} must be below num_magnitude_bins = {self.num_magnitude_bins}: lower the "
                "one or raise the other"
            )
        return self

    @property
    def is_identity(self) -> bool:
        return self.num_ops == 0

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        changed = images.clone()
        height, width = images.shape[2:]
        largest = _RAND_AUGMENT | {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height}
        strengths = _Strengths(torch.full((len(images),), self.magnitude), self.num_magnitude_bins - 1, largest)
        for step in range(self.num_ops):
            _change(changed, rng, step * _NUM_PARAMETERS, strengths, self.fill)
        return changed


@section
class TrivialAugmentWide(KeepsSize):
    """Apply one operation, drawn from fourteen, with a drawn strength.

    Same as torchvision's, with nearest interpolation and one fill for all channels. Geometry: see RandomAffine.
    Magnitudes are exact: bin 15 of 31 moves by 16 pixels, where torchvision's float32 may truncate 15.99 to 15.
    Müller and Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation" (2103.10158).

    Attributes:
        num_magnitude_bins: Number of strengths.
        fill: Gray level outside the image.
    """

    name: Literal["TrivialAugmentWide"]
    num_magnitude_bins: NumBins = 31
    interpolation: Literal["nearest"] = "nearest"
    fill: Level = 0

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        changed = images.clone()
        bins = rng.integers(self.num_magnitude_bins, _BIN)
        _change(changed, rng, 0, _Strengths(bins, self.num_magnitude_bins - 1, _TRIVIAL_AUGMENT_WIDE), self.fill)
        return changed


@dataclass(frozen=True)
class _Strengths:
    """Strength for each image: bins int64 [B], of 0 ... `last`; bin `last` is the `largest` magnitude."""

    bins: Tensor
    last: int
    largest: Mapping[str, float]

    def magnitudes(self, operation: str, rows: Tensor) -> Tensor:
        """Return unsigned magnitudes, float64 [R]."""
        return self.largest[operation] * self.bins[rows].double() / self.last


def _change(images: Tensor, rng: CounterRNG, first: int, strengths: _Strengths, fill: int) -> None:
    """Apply one step in place: each operation once, to all images that drew it; `first` is the first parameter."""
    chosen = rng.integers(len(_OPERATIONS), first + _OPERATION)
    signs = 1.0 - 2.0 * rng.bernoulli(0.5, first + _SIGN).double()
    for number, (name, function) in enumerate(_OPERATIONS.items()):
        rows = (chosen == number).nonzero()[:, 0]
        if function is not None and len(rows):
            magnitudes = strengths.magnitudes(name, rows) * (signs[rows] if name in _SIGNED else 1.0)
            apply_to_rows(images, rows, partial(function, fill), magnitudes)


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
"""Functions of (fill, images, magnitudes float64 [B]) in torchvision's order, indexed by the drawn number."""

_SHEARS, _MOVES = ("ShearX", "ShearY"), ("TranslateX", "TranslateY")
_COLORS = ("Brightness", "Color", "Contrast", "Sharpness")
_SIGNED = {*_SHEARS, *_MOVES, "Rotate", *_COLORS}

_COMMON = {"Solarize": 255.0, "AutoContrast": 0.0, "Equalize": 0.0}
_RAND_AUGMENT = {"Rotate": 30.0, "Posterize": 4.0} | dict.fromkeys(_SHEARS, 0.3) | dict.fromkeys(_COLORS, 0.9) | _COMMON
_TRIVIAL_AUGMENT_WIDE = (
    {"Rotate": 135.0, "Posterize": 6.0}
    | dict.fromkeys((*_SHEARS, *_COLORS), 0.99)
    | dict.fromkeys(_MOVES, 32.0)
    | _COMMON
)
"""The largest magnitudes: degrees, bits lost, slopes, pixels, factors above 1, levels inverted. RandAugment's
translations depend on the size of the image."""
