"""Where the value of every key of a recipe comes from: a default, a line of the file, the environment, or --set."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.layers import Layers, last_given
from pipeline.recipe.sentence import Keys

DEFAULT = "default"

MOST_LINES = 500
"""Of longer files, which people do not write by hand, the lines are not looked for: it takes the square of them."""


@dataclass(frozen=True)
class Setting:
    """The value in force at a key, and where it comes from: "default", "r.toml:12", "KDPIPE_SEED" or "--set"."""

    value: Any
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "origin": self.origin}


Settings = Mapping[str, Setting]
"""By key, as in "student.train.lr": of every key of a resolved recipe; entries of lists of tables go by number."""


def settings_of(resolved: Mapping[str, Any], layers: Layers) -> Settings:
    """Every key of a `resolved` recipe (`recipe_json`) with its value and origin."""
    given = dict(_leaves(layers.table))
    lines = _lines(layers.text)
    settings = {}
    for keys, value in _leaves(json.loads(json.dumps(resolved))):
        settings[".".join(keys)] = Setting(value, _origin(keys, layers, lines) if keys in given else DEFAULT)
    return settings


def not_default(settings: Settings) -> dict[str, Setting]:
    """The keys that somebody has given a value."""
    return {key: setting for key, setting in settings.items() if setting.origin != DEFAULT}


def _origin(keys: Keys, layers: Layers, lines: Mapping[Keys, int]) -> str:
    last = last_given(layers.given, keys)
    if last is not None:
        return last.origin
    return f"{layers.path}:{lines[keys]}" if keys in lines else layers.path


def _leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """What is no section, with its keys: lists of tables are sections with numbers, other lists are values."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    elif _is_tables(value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*keys, str(number)))
    elif keys:
        yield keys, value


def _is_tables(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(isinstance(one, Mapping) for one in value)


def _lines(text: str) -> dict[Keys, int]:
    """The line on which each key of a TOML file begins, counted from 1; empty for a long file.

    The TOML reader itself says so: a file up to a line's end is valid TOML if and only if a statement ends there, and
    what it then holds more than up to the statement before was said in between.
    """
    pieces = text.split("\n")
    found: dict[Keys, int] = {}
    begins = 1
    for number in range(1, len(pieces) + 1) if len(pieces) <= MOST_LINES else ():
        try:
            so_far = tomllib.loads("\n".join([*pieces[:number], ""]))
        except tomllib.TOMLDecodeError:
            continue
        for keys, _ in _leaves(so_far):
            found.setdefault(keys, begins)
        begins = number + 1
    return found
