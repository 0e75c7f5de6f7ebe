"""How every recipe section is declared: a frozen dataclass beside its owner, strictly checked by pydantic."""

from __future__ import annotations

import unicodedata
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
N = TypeVar("N", int, float)
V = TypeVar("V", bound=tuple[object, ...])

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Declare a section of a recipe: frozen, keyword-only, strictly typed; an unknown key is an error."""
    return pydantic_dataclass(config=STRICT, frozen=True, kw_only=True)(cls)  # type: ignore[return-value]


def _without_control(text: str) -> str:
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError("it has a control character, which no name or path needs")
    return text


Place = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_without_control)]
"""A name, a path or a URL. A NUL in one would end as a ValueError of whoever opens it."""

Bytes = Annotated[int, Field(ge=0, lt=2**63)]

Seed = Annotated[int, Field(ge=0, lt=2**63)]

Count = Annotated[int, Field(ge=1, le=10**6)]
"""Of batches, epochs or steps: more than a million of them is a slip of the pen."""


def at_most(limit: float) -> AfterValidator:
    """A validator of numbers that have no limit but reason: ValueError for what is a slip of the pen.

    Unlike Field(le=limit) it does not stand among what `kdpipe losses` says of a key.
    """

    def check(number: N) -> N:
        if number > limit:
            raise ValueError(f"more than {limit:,g} is a slip of the pen")
        return number

    return AfterValidator(check)


def unequal(values: V) -> V:
    """A validator of lists: ValueError where something stands there twice."""
    if len(set(values)) < len(values):
        raise ValueError("each may stand there once")
    return values
