"""L2 normalization with a finite gradient at zero rows."""

from __future__ import annotations

from torch import Tensor

MIN_NORM = 1e-12
"""Rows up to this norm count as zero."""


def unit_rows(rows: Tensor) -> Tensor:
    """L2-normalize [..., D] along the last axis; zero rows stay zero, with a gradient of zero.

    `F.normalize` divides a zero row's gradient by its eps instead, which overflows half precision.
    """
    squares = rows.square().sum(-1, keepdim=True)
    is_zero = squares <= MIN_NORM**2
    return (rows * squares.masked_fill(is_zero, 1.0).rsqrt()).masked_fill(is_zero, 0.0)
