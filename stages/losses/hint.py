"""Hints: the student's feature map, through an adapter, towards the teacher's. FitNets, Romero et al. 2015 (1412.6550).

Here the hint is trained together with everything else, as the field's reference code does; the paper's two stages
are not.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.config import section
from stages.errors import RecipeError


@section
class HintConfig:
    """weight times the mean squared error at each pair of (student layer, teacher layer)."""

    loss: Literal["hint"]
    layers: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    weight: Annotated[float, Field(ge=0)] = 100.0
    store: Annotated[int, Field(ge=0)] = 0


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements of two feature maps of equal shape [B, ...], in float32 or wider."""
    if student.dtype.itemsize < 4:
        student = student.float()
    return F.mse_loss(student, teacher.to(student.dtype))


def adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """A module that takes the student's map to the teacher's shape; both shapes without the batch axis.

    Maps (C, H, W): a convolution with BN and ReLU; 1x1 where H and W agree, strided where the student's map is twice
    as large, transposed where it is half, unpadded where it is larger by less. Vectors (D,): a linear layer.
    Raises RecipeError, with both shapes, where neither fits.
    """
    if len(student) == len(teacher) == 1:
        return nn.Linear(student[0], teacher[0])
    if len(student) == len(teacher) == 3:
        convolution = _convolution(student, teacher)
        if convolution is not None:
            return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU())
    raise RecipeError(
        f"a hint cannot join a student's feature of shape {list(student)} to a teacher's of {list(teacher)}: "
        "name layers whose maps have like sizes."
    )


def _convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module | None:
    (channels, height, width), (wanted, *sizes) = student, teacher
    if [height, width] == [2 * size for size in sizes]:
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1, bias=False)
    if [2 * height, 2 * width] == sizes:
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1, bias=False)
    if height >= sizes[0] and width >= sizes[1]:
        return nn.Conv2d(channels, wanted, (1 + height - sizes[0], 1 + width - sizes[1]), bias=False)
    return None
