"""Declaration of recipe sections: frozen dataclasses, strictly validated by pydantic."""

from __future__ import annotations

import functools
import json
import numbers
import operator
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.faults import fault_sentence, value_text
from kdpipe.store.errors import did_you_mean

T = TypeVar("T")
N = TypeVar("N", int, float)
V = TypeVar("V", bound=tuple[object, ...])

TABLES = ("dataclass_type", "dataclass_exact_type")
"""Errors of pydantic for a table in place of a section's object."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Declare a section of a recipe: frozen, keyword-only, strictly typed; an unknown key is an error.

    From Python the class takes settings as objects, or as a recipe writes them: lists for tuples, tables for sections.
    Wrong ones raise RecipeError.
    """
    made: Any = pydantic_dataclass(config=STRICT, frozen=True, kw_only=True)(cls)
    made.__init__ = _with_recipe_errors(made.__init__)
    return made  # type: ignore[no-any-return]


def _with_recipe_errors(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def checked(self: Any, *arguments: Any, **settings: Any) -> None:
        try:
            initialize(self, *arguments, **settings)
        except ValidationError as error:
            fault = _initialize_from_json(self, arguments, settings, error)
            if fault is not None:
                raise RecipeError(_first_fault(type(self), fault)) from None

    return checked


def _initialize_from_json(
    section: Any, arguments: tuple[Any, ...], settings: Mapping[str, Any], error: ValidationError
) -> ValidationError | None:
    """Initialize a section from what a recipe could write, or return why not: `error`, or a fault inside a table."""
    positional = [field.name for field in fields(section) if not field.kw_only]
    if len(arguments) > len(positional):
        return error
    given = {**dict(zip(positional, arguments, strict=False)), **settings}
    try:
        section.__pydantic_validator__.validate_json(
            json.dumps(given, allow_nan=False, default=_plain), self_instance=section
        )
    except ValidationError as found:
        return found if all(fault["type"] in TABLES for fault in error.errors()) else error
    except (TypeError, ValueError):
        return error
    return None


def _plain(value: Any) -> Any:
    """Return a number of numpy as Python's. Raises TypeError for other objects, as `json.dumps` wants it."""
    if isinstance(value, numbers.Real):  # numpy's are registered as such
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError


def with_words(fault: Mapping[str, Any], *others: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a fault whose message also names the words that the key takes instead, by the `others` of that key."""
    words = [other["ctx"]["expected"] for other in others if other["type"] == "literal_error"]
    return {**fault, "type": "", "msg": ", or ".join([fault_sentence(fault), *words])} if words else fault


def _first_fault(kind: type[Any], error: ValidationError) -> str:
    """Return the first fault of a section's settings in one sentence."""
    faults = error.errors()
    first_found, *others = [one for one in faults if one["type"] != "dataclass_type"] or faults  # number or schedule
    fault = with_words(first_found, *(one for one in others if one["loc"][:1] == first_found["loc"][:1]))
    names = [field.name for field in fields(kind) if field.init]
    positional = [field.name for field in fields(kind) if not field.kw_only]
    first, *rest = fault["loc"] or ("",)
    parts = [positional[first] if isinstance(first, int) and first < len(positional) else str(first), *map(str, rest)]
    key = ".".join([*parts[:1], *filter(str.isdigit, parts[1:])])
    if fault["type"] == "unexpected_keyword_argument":
        if len(parts) > 1 and (nested := _section_of(kind, parts[0])):
            kind, key, names = nested, parts[-1], [field.name for field in fields(nested) if field.init]
        hint = did_you_mean(key, names, otherwise=f"it takes {', '.join(names)}.")
        return f"{kind.__name__} has no setting {key!r}; {hint}"
    if fault["type"] == "unexpected_positional_argument":
        call = f"; to call it, build it first: {kind.__name__}()(...)" if "__call__" in dir(kind) else ""
        found = type(fault["input"]).__name__
        return f"{kind.__name__} takes its settings by name ({', '.join(names)}): found a positional {found}{call}."
    if fault["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{kind.__name__} lacks {key!r}: give it a value."
    setting = f": {key} = {value_text(repr(fault['input']))}" if key else ""
    return f"{kind.__name__}{setting}: {fault_sentence(fault)}."


def _section_of(kind: Any, key: str) -> type[Any] | None:
    """Return the section that a key of a section has as its value."""
    annotation = kind.__pydantic_fields__[key].annotation
    return next((one for one in (annotation, *get_args(annotation)) if is_dataclass(one)), None)  # type: ignore[return-value]


def _without_control(text: str) -> str:
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError("it has a control character")
    return text


def whole_number(name: str, value: Any, *, minimum: int = 0) -> int:
    """Return an argument as an int, a numpy integer too. Raises RecipeError for anything else, or below `minimum`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise RecipeError(f"{name} is {value!r:.40}: it must be a whole number, at least {minimum}.")
    return number


PathStr = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_without_control)]
"""A name, a path or a URL. NUL bytes are rejected here; open() would raise ValueError later."""


KindName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
"""The name of a kind of view."""


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

    A section's `later_keys`, which came after the first runs were made, count where they are not at their defaults,
    which a mapping names. Its `source_digests` are those of the user's own code that it names.
    """
    later = getattr(config, "later_keys", ())
    defaults = later if isinstance(later, Mapping) else asdict(type(config)()) if later else {}
    values = {key: value for key, value in asdict(config).items() if key != "checkpoint_every_s"}
    chosen = {key: value for key, value in values.items() if key not in later or value != defaults[key]}
    return {**chosen, **(config.source_digests() if hasattr(config, "source_digests") else {})}
