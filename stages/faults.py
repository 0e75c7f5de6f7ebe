"""What pydantic found wrong with a value, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from kdpipe.store.redact import redacted

MAX_VALUE_LETTERS = 80

_WHOLE, _TABLE = "it must be a whole number", "it must be a table of keys and values"

SENTENCES = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "string_type": "it must be a text in quotes",
    "string_too_short": "it is empty",
    "string_too_long": "it has more than {max_length} characters",
    "string_pattern_mismatch": "it does not match the pattern {pattern}",
    "literal_error": "it must be {expected}",
    "greater_than": "it must be greater than {gt:,.15g}",
    "greater_than_equal": "it must be at least {ge:,.15g}",
    "less_than": "it must be less than {lt:,.15g}",
    "less_than_equal": "it must be at most {le:,.15g}",
    "tuple_type": "it must be a list in brackets",
    "list_type": "it must be a list in brackets",
    "too_short": "its number of entries is {actual_length}, and must be at least {min_length}",
    "too_long": "its number of entries is larger than {max_length}",
    "missing": "the entry is missing",
    "dict_type": _TABLE,
    "dataclass_type": _TABLE,
    "dataclass_exact_type": _TABLE,
}
"""Sentences by pydantic's type of error, with its words in braces; the message of a ValueError stands as it is."""


def fault_sentence(fault: Mapping[str, Any]) -> str:
    """Return what a fault of `ValidationError.errors()` says is wanted, without a period, such as "it is empty"."""
    text = SENTENCES.get(fault["type"])
    if text is not None:
        return text.format(**fault.get("ctx", {}))
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


def value_text(value: object) -> str:
    """Return a value for a message, without secrets and not too long."""
    text = redacted(str(value))
    return text if len(text) <= MAX_VALUE_LETTERS else f"{text[: MAX_VALUE_LETTERS - 3]}..."


def with_message(expected: str) -> WrapValidator:
    """Return a validator that rejects values outside a union in one message: pydantic has one for each member."""

    def validated(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(tuple(value) if isinstance(value, list) else value)  # TOML has lists, not tuples
        except ValidationError as error:
            raise ValueError(f"expected {expected}") from error

    return WrapValidator(validated)
