"""Declaration of recipe sections: frozen dataclasses, strictly validated by pydantic."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeVar, dataclass_transform

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
        raise ValueError("it has a control character")
    return text


PathStr = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_without_control)]
"""A name, a path or a URL. NUL bytes are rejected here; open() would raise ValueError later."""


Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

Count = Annotated[int, Field(ge=1, le=10**6)]
"""A number of batches, epochs or steps; values above 1,000,000 are rejected as typos."""


def max_value(limit: float) -> AfterValidator:
    """Return a validator that rejects numbers above `limit` as typos.

    Unlike Field(le=limit) it is not listed by `kdpipe losses`.
    """

    def check(number: N) -> N:
        if number > limit:
            raise ValueError(f"values above {limit:,g} are rejected as typos")
        return number

    return AfterValidator(check)


def unique(values: V) -> V:
    """Validate that a list has no duplicates; raises ValueError otherwise."""
    if len(set(values)) < len(values):
        raise ValueError("it has duplicates")
    return values


def config_fingerprint(config: Any) -> Mapping[str, Any]:
    """Return a config section as JSON, without the keys that cannot change a result.

    A section's `later_keys`, which came after the first runs were made, count where they are not at their defaults. Its
    `source_digests` are those of the user's own code that it names.
    """
    later = getattr(config, "later_keys", ())
    defaults = asdict(type(config)()) if later else {}
    values = {key: value for key, value in asdict(config).items() if key != "checkpoint_every_s"}
    chosen = {key: value for key, value in values.items() if key not in later or value != defaults[key]}
    return {**chosen, **(config.source_digests() if hasattr(config, "source_digests") else {})}
