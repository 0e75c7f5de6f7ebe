"""Turn validation errors of a recipe into messages: the key, the value found, what is wanted, and its origin."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from kdpipe.stages.config import with_words
from kdpipe.stages.faults import fault_sentence, value_text
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.registry import LOSSES, loss_class
from kdpipe.store.errors import did_you_mean

Keys = tuple[str, ...]
"""The path of a value in a recipe; entries of a list have numbers for keys."""

NEEDED = ("missing", "missing_argument")
UNKNOWN_LOSS = ("union_tag_invalid", "union_tag_not_found")

MAX_KEY_LETTERS = 80


def fault_messages(recipe: type, error: ValidationError, origin_of: Callable[[Keys], str]) -> list[str]:
    """Return one message for each invalid key, in the order in which pydantic found them.

    Args:
        recipe: The dataclass of the whole recipe.
        error: What pydantic raised.
        origin_of: Returns the file or override that set some keys.
    """
    faults = error.errors()
    by_key: dict[str, list[Any]] = {}
    for fault in faults:
        if not (_is_secondary(fault) and any(_is_told_by(fault, other) for other in faults)):
            by_key.setdefault(_shown(_keys(fault)), []).append(fault)
    return [one_line(_message(recipe, with_words(*found), origin_of)) for found in by_key.values()]


def first_and_more(messages: Sequence[str]) -> str:
    """Return the first of the messages, and the number of the others."""
    more = f" ({len(messages) - 1} more faults: `kdpipe recipe check` lists all)" if len(messages) > 1 else ""
    return f"{messages[0]}{more}"


def one_line(text: str) -> str:
    """Return `text` with line breaks and other control characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def known_keys(kind: Any, location: Sequence[str]) -> list[str]:
    """Return the keys of the section at `location`, from the types of the section `kind`.

    `location` has the name of a loss after its number.
    """
    location = list(location)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is Loss and location:
        kind = loss_class(location.pop(0))
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if is_dataclass(option)]
        return known_keys(options[0], location) if options else []
    if get_origin(kind) in (dict, tuple):
        return known_keys(get_args(kind)[1 if get_origin(kind) is dict else 0], location[1:])
    if not is_dataclass(kind):
        return []
    if not location:
        return [field.name for field in fields(kind)]
    return known_keys(typing.get_type_hints(kind, include_extras=True).get(location[0]), location[1:])


def _message(recipe: type, error: Mapping[str, Any], origin_of: Callable[[Keys], str]) -> str:
    location, kind = _keys(error), error["type"]
    key, keys = _shown(location), tuple(_without_tag(location))
    origin = origin_of(keys)
    if kind == "unexpected_keyword_argument":
        return f"{origin}: unknown key {key!r}; {_hint(known_keys(recipe, location[:-1]), keys[-1], origin)}"
    if kind in NEEDED:
        return f"{origin}: the key {key!r} is missing: give it a value."
    if kind in UNKNOWN_LOSS:
        return f"{origin}: {key}: {_unknown_loss(error['input'])}"
    if kind == "loss_reference":
        return f"{origin}: {key}.{error['msg'].removeprefix('distill.')}"
    named = f"{key} = {value_text(error['input'])}" if key else "the recipe"
    return f"{origin}: {named}: {fault_sentence(error)}."


def _unknown_loss(entry: Any) -> str:
    names = LOSSES.names()
    choice = f"choose from {', '.join(names)}, or python:MODULE:NAME."
    name = entry.get("loss") if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        return f"the loss is missing: {choice}"
    return f"unknown loss {value_text(name)!r}; {did_you_mean(name, names, otherwise=choice)}"


def _hint(known: list[str], key: str, origin: str) -> str:
    hint = did_you_mean(key, known, otherwise=f"known here: {', '.join(known)}.")
    return f"{hint} In variables, `__` separates keys." if origin.startswith("KDPIPE_") else hint


def _is_secondary(error: Mapping[str, Any]) -> bool:
    """Return whether a table was tried as a number, or a number as a table, or a list lacks entries with faults."""
    is_table = isinstance(error["input"], dict)
    return error["type"] in ("dataclass_type", "too_short") or (
        is_table and error["type"] in ("float_type", "string_type", "literal_error", "tuple_type")
    )


def _is_told_by(error: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether another fault of the same key, or of one inside it, says what is wrong."""
    keys = _keys(error)
    return not _is_secondary(other) and _keys(other)[: len(keys)] == keys


def _keys(error: Mapping[str, Any]) -> list[str]:
    """Return the keys of an error, without pydantic's names for the alternative types of a value."""
    parts = [str(part) for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":  # the user's own word, even if it looks like an alternative
        return [*_keys({**error, "type": "", "loc": parts[:-1]}), parts[-1]]
    named = parts[: _tag_index(parts) + 1] if "distill" in parts else parts[: 2 * (parts[:1] == ["compare"])]
    found = [part for part in parts[len(named) :] if re.fullmatch(r"[a-z0-9_]+", part)]
    return named + [part for part in found if part not in ("float", "int", "str")]


def _without_tag(location: list[str]) -> list[str]:
    """Return the keys as in the file: without the name of a loss, by which pydantic distinguishes them."""
    tag = _tag_index(location)
    return location[:tag] + location[tag + 1 :]


def _tag_index(location: list[str]) -> int:
    """Return where the name of a loss is, in distill.NUMBER.LOSS or compare.NAME.distill.NUMBER.LOSS."""
    section = 2 if location[:1] == ["compare"] else 0
    return section + 2 if location[section : section + 1] == ["distill"] else len(location)


def _shown(location: list[str]) -> str:
    most = MAX_KEY_LETTERS
    return ".".join(key if len(key) <= most else f"{key[:most]}..." for key in _without_tag(location))
