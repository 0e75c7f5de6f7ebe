"""How every recipe section is declared: a frozen dataclass beside its owner, strictly checked by pydantic."""

from __future__ import annotations

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
V = TypeVar("V", bound=tuple[object, ...])

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Declare a section of a recipe: frozen, keyword-only, strictly typed; an unknown key is an error."""
    return pydantic_dataclass(config=STRICT, frozen=True, kw_only=True)(cls)  # type: ignore[return-value]


def unequal(values: V) -> V:
    """A validator of lists: ValueError where something stands there twice."""
    if len(set(values)) < len(values):
        raise ValueError("each may stand there once")
    return values
