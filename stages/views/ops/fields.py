"""Argument types and behavior that several operations share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from kdpipe.stages.faults import with_message


def _ascending(bounds: tuple[float, ...]) -> tuple[float, ...]:
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        if low > high:
            raise ValueError(f"the low end comes first: [{high}, {low}], not [{low}, {high}]")
    return bounds


Ascending = AfterValidator(_ascending)
"""One or more pairs in a row, each with its low end first."""

Probability = Annotated[float, Field(ge=0, le=1)]

Level = Annotated[int, Field(ge=0, le=255)]
"""A gray level."""

Share = Annotated[float, Field(ge=0, le=1)]
AreaRange = Annotated[tuple[Share, Share], Ascending]
"""Minimum and maximum area of a box, as fractions of the image's."""

Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
RatioRange = Annotated[tuple[Ratio, Ratio], Ascending]

Side = Annotated[int, Field(ge=1, le=2**14)]

Size = Annotated[Side | tuple[Side, Side] | None, with_message("one side or [height, width], 1 to 16384")]
"""An image size: one side, (H, W), or None for the input's."""


def side_lengths(size: int | tuple[int, int] | None, before: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of a `Size`, for images of (H, W) `before`."""
    if size is None:
        return before
    return (size, size) if isinstance(size, int) else size


class KeepsSize:
    """An operation whose output has the size of its input."""

    @property
    def is_identity(self) -> bool:
        """Whether it changes no image, whatever is drawn."""
        return False

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W), unchanged."""
        return size
