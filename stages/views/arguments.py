"""What several operations take as arguments, and how their recipes are refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def _ascending(bounds: tuple[float, ...]) -> tuple[float, ...]:
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        if low > high:
            raise ValueError(f"the low end comes first: [{high}, {low}], not [{low}, {high}]")
    return bounds


def or_say(wanted: str) -> WrapValidator:
    """Refuse with one sentence what is no member of a union: pydantic has one for each member."""

    def validated(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(tuple(value) if isinstance(value, list) else value)  # recipes have lists, for want of tuples
        except ValidationError as error:
            raise ValueError(f"wanted is {wanted}") from error

    return WrapValidator(validated)


Ascending = AfterValidator(_ascending)
"""Of pairs, low end first, one or more in a row."""

Probability = Annotated[float, Field(ge=0, le=1)]

Level = Annotated[int, Field(ge=0, le=255)]
"""A grey level."""

Share = Annotated[float, Field(ge=0, le=1)]
AreaRange = Annotated[tuple[Share, Share], Ascending]
"""The least and the largest area of a box, as shares of the picture's."""

Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
RatioRange = Annotated[tuple[Ratio, Ratio], Ascending]

Side = Annotated[int, Field(ge=1, le=2**14)]

Size = Annotated[Side | tuple[Side, Side] | None, or_say("one side or [height, width], 1 to 16384")]
"""Of a picture: one side, (H, W), or none for that of the picture before."""


def side_lengths(size: int | tuple[int, int] | None, before: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a `Size`, for pictures that were of (H, W) `before`."""
    if size is None:
        return before
    return (size, size) if isinstance(size, int) else size
