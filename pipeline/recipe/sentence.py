"""What is wrong with a recipe, in sentences: which key, what was found, what is wanted, and who gave it."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from stages.losses.terms import LOSSES

Keys = tuple[str, ...]
"""Where something stands in a recipe; entries of a list go by number."""

NEEDED = ("missing", "missing_argument")
UNKNOWN_LOSS = ("union_tag_invalid", "union_tag_not_found")

MOST_FAULTS = 200
"""Are told of one recipe: each takes a look at all known keys."""

MOST_LETTERS = 80
"""Of a key, in a sentence."""


def faults(recipe: type, error: ValidationError, giver: Callable[[Keys, bool], str]) -> list[str]:
    """One sentence for each key that is wrong, in the order in which pydantic met them.

    recipe: the section at the top. giver: who gave what stands at these keys, a file or an override; its second
    argument says whether overrides of keys below these count too.
    """
    errors = [one for one in error.errors() if not _of_another_kind(one)] or error.errors()
    first_of = {_shown(_keys(one)): one for one in reversed(errors)}
    shown = list(dict.fromkeys(_shown(_keys(one)) for one in errors))
    told = [one_line(_sentence(recipe, first_of[key], giver)) for key in shown[:MOST_FAULTS]]
    more = f"and {len(shown) - MOST_FAULTS} more faults like these: this is no recipe."
    return told + [more] * (len(shown) > MOST_FAULTS)


def first_and_more(sentences: Sequence[str]) -> str:
    """The first of the sentences, and how many more there are."""
    more = f" ({len(sentences) - 1} more like this: `kdpipe recipe check` lists all)" if len(sentences) > 1 else ""
    return f"{sentences[0]}{more}"


def one_line(text: str) -> str:
    """`text` with its line breaks and other control characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def variable(keys: Sequence[str]) -> str:
    """The environment variable that stands for a key."""
    return "KDPIPE_" + "__".join(key.upper() for key in keys)


def known_keys(kind: Any, location: Sequence[str]) -> list[str]:
    """The keys that the section at `location` has, by walking the types of the section `kind`. Of several sections that
    may stand there, as losses do, `location` names one by its tag, behind its place.
    """
    location = list(location)
    if get_origin(kind) is Annotated:
        return known_keys(get_args(kind)[0], location)
    if get_origin(kind) in (Union, UnionType):
        return _known_of_options([option for option in get_args(kind) if is_dataclass(option)], location)
    if get_origin(kind) in (dict, tuple):
        return known_keys(get_args(kind)[1 if get_origin(kind) is dict else 0], location[1:])
    if not is_dataclass(kind):
        return []
    if not location:
        return [field.name for field in fields(kind)]
    return known_keys(typing.get_type_hints(kind, include_extras=True).get(location[0]), location[1:])


def _known_of_options(options: list[Any], location: list[str]) -> list[str]:
    if len(options) > 1 and location:
        options = [option for option in options if _tag(option) == location[0]]
        location = location[1:]
    return known_keys(options[0], location) if options else []


def _sentence(recipe: type, error: Mapping[str, Any], giver: Callable[[Keys, bool], str]) -> str:
    location, kind = _keys(error), error["type"]
    key, place = _shown(location), tuple(_without_tag(location))
    where = giver(place, kind not in (*NEEDED, *UNKNOWN_LOSS))
    if kind == "unexpected_keyword_argument":
        if where.startswith("KDPIPE_"):
            return f"{where}: unknown key {key!r}; {_hint_of_variable(recipe, location, place, where)}"
        return f"{where}: unknown key {key!r}; {_hint(known_keys(recipe, location[:-1]), place[-1])}"
    if kind in NEEDED:
        return f"{where}: the key {key!r} is missing: give it a value."
    if kind in UNKNOWN_LOSS:
        losses = [str(_tag(loss)) for loss in LOSSES]
        return f"{where}: {key} needs a loss that exists; known are {', '.join(losses)}."
    found, message = str(error["input"]), error["msg"].removeprefix("Value error, ")
    named = f"{key} = {found[:80]}" if key else "the recipe"
    return f"{where}: {named}: {message[0].lower()}{message[1:]}."


def _hint(known: list[str], key: str) -> str:
    near = get_close_matches(key, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."


def _hint_of_variable(recipe: type, location: list[str], place: Keys, where: str) -> str:
    """The same in the words of the environment, where people also forget that `__` stands between keys."""
    known = known_keys(recipe, location[:-1])
    rest = where.removeprefix("KDPIPE_").lower().split("__")[len(place) :]
    near = [variable([*place[:-1], each, *rest]) for each in get_close_matches(place[-1], known, 1, 0.5)]
    if len(place) == 1:
        whole = {"_".join(keys): variable(keys) for keys in _all_keys(recipe)}
        near = [whole[each] for each in get_close_matches(place[0], whole, 1, 0.9)] or near
    if near:
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(variable([*place[:-1], each]) for each in known)}."


def _all_keys(recipe: type, keys: Keys = ()) -> Iterator[Keys]:
    """Every key below `keys`, but for those of lists."""
    for each in known_keys(recipe, keys):
        if each not in ("distill", "compare"):
            yield (*keys, each)
            yield from _all_keys(recipe, (*keys, each))


def _of_another_kind(error: Mapping[str, Any]) -> bool:
    """Whether an error says that a table is no number, or a number no table, where either may stand."""
    return error["type"] == "dataclass_type" or (
        isinstance(error["input"], dict)
        and error["type"] != "extra_forbidden"
        and error["type"] in ("float_type", "string_type", "literal_error", "tuple_type")
    )


def _keys(error: Mapping[str, Any]) -> list[str]:
    """Where an error is: the keys, without pydantic's names for the alternatives that a value has."""
    parts = [str(part) for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":  # what people wrote there is no name of an alternative
        return [*_keys({**error, "type": "", "loc": parts[:-1]}), parts[-1]]
    named = parts[:2] if parts[:1] == ["compare"] else []  # names of entries are people's own
    found = [part for part in parts[len(named) :] if re.fullmatch(r"[a-z0-9_]+", part)]
    return named + [part for part in found if part not in ("float", "int", "str")]


def _without_tag(location: list[str]) -> list[str]:
    """The keys as people write them: without the tag by which pydantic tells losses apart."""
    tag = location.index("distill") + 2 if "distill" in location else len(location)
    return location[:tag] + location[tag + 1 :]


def _shown(location: list[str]) -> str:
    return ".".join(key if len(key) <= MOST_LETTERS else f"{key[:MOST_LETTERS]}..." for key in _without_tag(location))


def _tag(kind: Any) -> str | None:
    """The value of a loss section's `loss` key."""
    hint = typing.get_type_hints(kind).get("loss")
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else None
