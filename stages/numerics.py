"""Seeds and numerics shared by all stages."""

from __future__ import annotations

import hashlib

from torch import Tensor


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derive a seed in [0, 2^63) for one purpose, which `parts` identify, from the recipe's seed."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def to_float32(values: Tensor) -> Tensor:
    """Return the values in float32 or wider: half precision loses sums over maps and the tail of a softmax."""
    return values if values.dtype.itemsize >= 4 else values.float()


PROBABILITIES, LOG_PROBABILITIES = "probabilities", "log-probabilities"

SUM_TOLERANCE = 2e-3
"""Half precision sums probabilities to 1 within it."""


def kinds_of_outputs(outputs: Tensor) -> frozenset[str]:
    """Return what outputs [B, C] that should be logits are in all rows: PROBABILITIES, LOG_PROBABILITIES, or nothing.

    Log-probabilities are logits, but for a constant in each row.
    """
    outputs = outputs.double()

    def add_up_to_one(probabilities: Tensor) -> bool:
        return bool(((probabilities.sum(1) - 1).abs() <= SUM_TOLERANCE).all())

    found = [PROBABILITIES] if bool((outputs >= 0).all()) and add_up_to_one(outputs) else []
    found += [LOG_PROBABILITIES] if bool((outputs <= 0).all()) and add_up_to_one(outputs.exp()) else []
    return frozenset(found)


MAX_FLOAT32_TEMPERATURE = 20.0
"""Above it T^2 times the rounding of float32 is no longer small beside a divergence of softened probabilities."""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T in float32 or wider; in float64 at temperatures above `MAX_FLOAT32_TEMPERATURE`."""
    return (logits.double() if temperature > MAX_FLOAT32_TEMPERATURE else to_float32(logits)) / temperature


MIN_NORM = 1e-12
"""Rows up to this norm count as zero."""


def normalize_rows(rows: Tensor) -> Tensor:
    """L2-normalize [..., D] along the last axis; zero rows stay zero, with a gradient of zero.

    `F.normalize` divides a zero row's gradient by its eps instead, which overflows half precision.
    """
    squares = rows.square().sum(-1, keepdim=True)
    is_zero = squares <= MIN_NORM**2
    return (rows * squares.masked_fill(is_zero, 1.0).rsqrt()).masked_fill(is_zero, 0.0)
