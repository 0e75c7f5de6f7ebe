"""Recipe values that change during training: temperatures and weights, constant or scheduled.

Like the learning rate they are pure functions of the epoch, so that a resumed job needs no state for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kdpipe.stages.config import max_value, section


@dataclass(frozen=True)
class TrainProgress:
    """The progress of a training: `epoch` of `epochs`, counted from 0; infinity after all schedules have ended."""

    epoch: float
    epochs: int


FINISHED = TrainProgress(math.inf, 1)
"""The progress after every schedule: fine-tuning of a compressed student continues where training ended."""


MAX_WEIGHT = 1e38
"""Close to the largest float32."""

Epoch = Annotated[int, Field(ge=0, le=10**6)]


def _ascending(epochs: tuple[int, int]) -> tuple[int, int]:
    if epochs[0] > epochs[1]:
        raise ValueError("the first epoch must not be after the last")
    return epochs


@section
class Schedule:
    """A number that changes from `start` to `end`, epoch by epoch.

    Attributes:
        start: value up to the first of `epochs`.
        end: value from the last of `epochs` on.
        shape: "linear", or "cosine" for half a cosine period.
        epochs: first and last epoch of the change, counted from 0; two equal ones switch at that epoch. By default
            those of the training.
    """

    start: Annotated[float, Field(ge=0), max_value(MAX_WEIGHT)]
    end: Annotated[float, Field(ge=0), max_value(MAX_WEIGHT)]
    shape: Literal["linear", "cosine"] = "linear"
    epochs: Annotated[tuple[Epoch, Epoch], AfterValidator(_ascending)] | None = None


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1000.0
"""The temperatures of losses, as those of stores with top-k logits; T^2 times the rounding of float32 logits is noise
beyond."""


def _in_range(temperature: float | Schedule) -> float | Schedule:
    lowest, highest = bounds(temperature)
    if lowest < MIN_TEMPERATURE or highest > MAX_TEMPERATURE:
        raise ValueError(
            f"a temperature must be from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:,g}: T^2 times the rounding of the "
            "logits is all that remains of a loss beyond"
        )
    return temperature


Scheduled = Annotated[float, Field(ge=0), max_value(MAX_WEIGHT)] | Schedule
"""A weight: a number or a schedule."""

Temperature = Annotated[Annotated[float, Field(gt=0)] | Schedule, AfterValidator(_in_range)]
"""A temperature: a number from 0.01 to 1,000, or a schedule."""


def value_at(value: float | Schedule, progress: TrainProgress) -> float:
    """Return the value at a point of the training."""
    if not isinstance(value, Schedule):
        return value
    first, last = value.epochs or (0, progress.epochs - 1)
    if progress.epoch >= last:
        share = 1.0
    elif progress.epoch <= first:
        share = 0.0
    else:
        share = (progress.epoch - first) / (last - first)
    if value.shape == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return value.start + (value.end - value.start) * share


def bounds(value: float | Schedule) -> tuple[float, float]:
    """Return the lowest and the highest value."""
    if not isinstance(value, Schedule):
        return value, value
    return min(value.start, value.end), max(value.start, value.end)


def warmup_factor(epochs: int, progress: TrainProgress) -> float:
    """Return min((epoch + 1) / epochs, 1), the linear warm-up of the reference codes; 1 if `epochs` is 0."""
    return 1.0 if epochs == 0 else min((progress.epoch + 1) / epochs, 1.0)
