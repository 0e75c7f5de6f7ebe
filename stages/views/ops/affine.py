"""RandomAffine and the geometric operations of RandAugment: rotate, translate, scale and shear.

Matrices are computed in float64 on the CPU, coordinates in fixed point: the same pixels on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.views.ops.color import FRACTION_BITS, ONE
from kdpipe.stages.views.ops.fields import Ascending, KeepsSize, Level
from kdpipe.stages.views.ops.rows import apply_to_rows
from kdpipe.stages.views.rng import CounterRNG

_ANGLE, _RIGHT, _DOWN, _SCALE, _SHEAR_X, _SHEAR_Y = range(6)

_Angle = Annotated[float, Field(ge=-360, le=360)]
_Shear = Annotated[float, Field(ge=-89, le=89)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Scale = Annotated[float, Field(ge=0.01, le=100)]
_AngleRange = Annotated[tuple[_Angle, _Angle], Ascending]
_ShearRange = Annotated[tuple[_Shear, _Shear], Ascending]
_ShearRanges = Annotated[tuple[_Shear, _Shear, _Shear, _Shear], Ascending]


@section
class RandomAffine(KeepsSize):
    """Rotate, translate, scale and shear by random amounts, with nearest interpolation.

    Same as torchvision's, with one fill for all channels. Angles are at most 360 degrees, shears 89, scales 0.01 to
    100. Points halfway between two pixels may come from the other one.

    Attributes:
        degrees: Rotation in [-degrees, degrees), or [low, high].
        translate: [a, b] moves by at most a widths to either side and b heights up or down, in whole pixels.
        scale: [low, high].
        shear: Degrees along x in [-shear, shear); or [low, high]; or [low x, high x, low y, high y].
        fill: Gray level outside the image.
        center: Fixed point [x, y] in pixels from the upper left corner; default is the image's center.
    """

    name: Literal["RandomAffine"]
    degrees: Annotated[float, Field(ge=0, le=360)] | _AngleRange
    translate: tuple[_Share, _Share] | None = None
    scale: Annotated[tuple[_Scale, _Scale], Ascending] | None = None
    shear: Annotated[float, Field(ge=0, le=89)] | _ShearRange | _ShearRanges | None = None
    interpolation: Literal["nearest"] = "nearest"
    fill: Level = 0
    center: tuple[float, float] | None = None

    @property
    def is_identity(self) -> bool:
        return (
            _around_zero(self.degrees) == (0, 0)
            and self.translate in (None, (0, 0))
            and self.scale in (None, (1, 1))
            and self._shears() == ((0, 0), (0, 0))
        )

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        changed = images.clone()
        matrices = self._matrices(rng, (images.shape[2], images.shape[3]))
        apply_to_rows(changed, torch.arange(len(images)), lambda part, to: affine(part, to, self.fill), matrices)
        return changed

    def _matrices(self, rng: CounterRNG, size: tuple[int, int]) -> Tensor:
        """Draw matrices float64 [B, 2, 3], see inverse_matrices."""
        height, width = size
        right, down = (share * side for share, side in zip(self.translate or (0.0, 0.0), (width, height), strict=True))
        along_x, along_y = self._shears()
        return inverse_matrices(
            angle=rng.uniform(*_around_zero(self.degrees), _ANGLE),
            translate=torch.stack([rng.uniform(-right, right, _RIGHT), rng.uniform(-down, down, _DOWN)], 1).round(),
            scale=rng.uniform(*(self.scale or (1.0, 1.0)), _SCALE),
            shear=torch.stack([rng.uniform(*along_x, _SHEAR_X), rng.uniform(*along_y, _SHEAR_Y)], 1),
            center=(self.center[0] - width / 2, self.center[1] - height / 2) if self.center else (0.0, 0.0),
        )

    def _shears(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the ranges along x and along y."""
        if isinstance(self.shear, tuple) and len(self.shear) == 4:
            return self.shear[:2], self.shear[2:]
        return _around_zero(self.shear or 0.0), (0.0, 0.0)


def _around_zero(amount: float | tuple[float, float]) -> tuple[float, float]:
    return amount if isinstance(amount, tuple) else (-amount, amount)


def affine(images: Tensor, matrices: Tensor, fill: int = 0) -> Tensor:
    """Take each pixel from where its image's matrix maps it, rounded to the nearest; `fill` outside the image.

    Coordinates are sums of a column part and a row part, each rounded to 2^-16 pixels and clipped at 16,384 pixels.
    Matrices are float64 [B, 2, 3], see inverse_matrices.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, [1] * 4, value=fill)  # a frame for all coordinates outside the image
    across = np.arange(width) + 0.5 - width / 2
    down = np.arange(height) + 0.5 - height / 2
    to = matrices.numpy()[:, :, :, None]
    columns = _coordinates(to[:, 0, 0] * across, to[:, 0, 1] * down + (to[:, 0, 2] + width / 2), width, images.device)
    rows = _coordinates(to[:, 1, 0] * across, to[:, 1, 1] * down + (to[:, 1, 2] + height / 2), height, images.device)
    index = rows.mul_(width + 2).add_(columns).reshape(batch, 1, -1).long().expand(-1, channels, -1)
    return padded.reshape(batch, channels, -1).gather(2, index).reshape(images.shape)


def _coordinates(
    of_column: NDArray[np.float64], of_row: NDArray[np.float64], length: int, device: torch.device
) -> Tensor:
    """Return indices into the padded image, int32 [B, H, W], from their parts [B, W] and [B, H] in pixels."""
    limit = 2**30 - 1
    parts = [
        torch.from_numpy(np.rint(part * ONE).clip(-limit, limit).astype(np.int32)).to(device, non_blocking=True)
        for part in (of_column, of_row + 1)
    ]
    return (parts[0][:, None, :] + parts[1][:, :, None]).bitwise_right_shift_(FRACTION_BITS).clamp_(0, length + 1)


def inverse_matrices(
    *,
    angle: Tensor,
    translate: Tensor | None = None,
    scale: Tensor | None = None,
    shear: Tensor | None = None,
    center: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Return matrices float64 [B, 2, 3] from output to input (x, y, 1), in pixels from the image center.

    torchvision's conventions, except for the origin of `center`.

    Args:
        angle: Degrees clockwise, float64 [B].
        translate: Pixels right and down, float64 [B, 2].
        scale: float64 [B].
        shear: Degrees along x and y, float64 [B, 2].
        center: Fixed point (x, y) from the image center.
    """
    pixels = np.zeros((len(angle), 2)) if translate is None else translate.numpy()
    size = np.ones(len(angle)) if scale is None else scale.numpy()
    turn = np.radians(angle.numpy())
    slant_x, slant_y = np.zeros((2, len(angle))) if shear is None else np.radians(shear.numpy().T)
    tan_x, cos_y = _map(math.tan, slant_x), _map(math.cos, slant_y)
    a, c = _map(math.cos, turn - slant_y) / cos_y, _map(math.sin, turn - slant_y) / cos_y
    b, d = -(a * tan_x + _map(math.sin, turn)), _map(math.cos, turn) - c * tan_x
    inverse = np.stack([d, -b, -c, a], 1).reshape(-1, 2, 2) / size[:, None, None]
    x, y = center[0] + pixels[:, 0, None], center[1] + pixels[:, 1, None]
    offset = np.asarray(center) - inverse[:, :, 0] * x - inverse[:, :, 1] * y
    return torch.from_numpy(np.concatenate([inverse, offset[:, :, None]], 2))


def _map(function: Callable[[float], float], values: NDArray[np.float64]) -> NDArray[np.float64]:
    # numpy's sines may differ in the last bit between the vectorized body of an array and its tail
    return np.array([function(value) for value in values.tolist()])


def rotate(images: Tensor, degrees: Tensor, fill: int = 0) -> Tensor:
    """Rotate counterclockwise around the center by `degrees`, float64 [B]."""
    return affine(images, inverse_matrices(angle=-degrees), fill)


def translate_x(images: Tensor, pixels: Tensor, fill: int = 0) -> Tensor:
    """Move to the right by `pixels`, float64 [B]."""
    matrices = _identity_matrices(len(pixels))
    matrices[:, 0, 2] = -pixels
    return affine(images, matrices, fill)


def translate_y(images: Tensor, pixels: Tensor, fill: int = 0) -> Tensor:
    """Move down by `pixels`, float64 [B]."""
    matrices = _identity_matrices(len(pixels))
    matrices[:, 1, 2] = -pixels
    return affine(images, matrices, fill)


def shear_x(images: Tensor, slopes: Tensor, fill: int = 0) -> Tensor:
    """Move points y below the upper edge to the left by slope * y; slopes float64 [B]."""
    matrices = _identity_matrices(len(slopes))
    matrices[:, 0, 1] = slopes
    matrices[:, 0, 2] = slopes * (images.shape[2] / 2)
    return affine(images, matrices, fill)


def shear_y(images: Tensor, slopes: Tensor, fill: int = 0) -> Tensor:
    """Move points x right of the left edge up by slope * x; slopes float64 [B]."""
    matrices = _identity_matrices(len(slopes))
    matrices[:, 1, 0] = slopes
    matrices[:, 1, 2] = slopes * (images.shape[3] / 2)
    return affine(images, matrices, fill)


def _identity_matrices(batch: int) -> Tensor:
    return torch.eye(2, 3, dtype=torch.float64).repeat(batch, 1, 1)
