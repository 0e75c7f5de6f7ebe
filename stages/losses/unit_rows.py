"""Rows scaled to length 1, with a gradient that is finite where a row is zero."""

from __future__ import annotations

from torch import Tensor

SHORTEST = 1e-12
"""Rows up to this length are zero: they have no direction."""


def unit_rows(rows: Tensor) -> Tensor:
    """[..., D] scaled to length 1 along the last axis; zero rows stay zero, with a gradient of zero.

    `F.normalize` divides a zero row's gradient by its eps instead, which is more than half precision can hold.
    """
    squares = rows.square().sum(-1, keepdim=True)
    is_zero = squares <= SHORTEST**2
    return (rows * squares.masked_fill(is_zero, 1.0).rsqrt()).masked_fill(is_zero, 0.0)
