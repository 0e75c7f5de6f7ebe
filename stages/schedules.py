"""Numbers of a recipe that may change while a student learns: temperatures and weights, constant or on a ramp.

Like the learning rate they are pure functions of the epoch, so that a resumed job needs no state for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.config import at_most, section


@dataclass(frozen=True)
class Moment:
    """Where a training is: in epoch `epoch` of `epochs`, counted from 0; infinity where all ramps have ended."""

    epoch: float
    epochs: int


SETTLED = Moment(math.inf, 1)
"""The moment after every ramp: fine-tuning of a pruned or quantized student goes on where its training ended."""


LARGEST = 1e38
"""Of weights: float32 holds little more."""

Epoch = Annotated[int, Field(ge=0, le=10**6)]


def _ascending(epochs: tuple[int, int]) -> tuple[int, int]:
    if epochs[0] > epochs[1]:
        raise ValueError("the first epoch comes before the last")
    return epochs


@section
class Ramp:
    """A number that goes from `start` to `end`, linearly or by half a cosine, epoch by epoch.

    epochs: the epoch until which it stays at `start`, and the one from which on it is at `end`; by default the
    training's first and last.
    """

    start: Annotated[float, Field(ge=0), at_most(LARGEST)]
    end: Annotated[float, Field(ge=0), at_most(LARGEST)]
    shape: Literal["linear", "cosine"] = "linear"
    epochs: Annotated[tuple[Epoch, Epoch], AfterValidator(_ascending)] | None = None


def _hot(temperature: float | Ramp) -> float | Ramp:
    if min(extremes(temperature)) <= 0:
        raise ValueError("a temperature is above 0")
    return temperature


Amount = Annotated[float, Field(ge=0), at_most(LARGEST)] | Ramp
"""A weight: a number, or a ramp."""

Temperature = Annotated[Annotated[float, Field(gt=0), at_most(10**9)] | Ramp, AfterValidator(_hot)]
"""A temperature: a number above 0, or a ramp."""


def amount_at(amount: float | Ramp, moment: Moment) -> float:
    """The number in force at a moment."""
    if not isinstance(amount, Ramp):
        return amount
    first, last = amount.epochs or (0, moment.epochs - 1)
    done = 1.0 if moment.epoch >= last else max(0.0, (moment.epoch - first) / (last - first))
    if amount.shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return amount.start + (amount.end - amount.start) * done


def extremes(amount: float | Ramp) -> tuple[float, float]:
    """The lowest and the highest number that it ever is."""
    if not isinstance(amount, Ramp):
        return amount, amount
    return min(amount.start, amount.end), max(amount.start, amount.end)
