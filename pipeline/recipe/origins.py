"""Find the origin of every value of a recipe: a default, a line of the file, the environment, or --set."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.recipe.messages import Keys
from kdpipe.pipeline.recipe.overrides import Overrides

DEFAULT = "default"

MAX_LINES = 500
"""Lines are not numbered in longer files: the search takes time quadratic in their number."""


@dataclass(frozen=True)
class Setting:
    """The value of a key, and its origin: "default", "r.toml:12", "KDPIPE_SEED" or "--set"."""

    value: Any
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "origin": self.origin}


Settings = Mapping[str, Setting]
"""Settings by dotted key, such as "student.train.lr"; entries of lists of tables have numbers for keys."""


def settings_of(resolved: Mapping[str, Any], source: Overrides) -> Settings:
    """Return the value and origin of every key of a resolved recipe (`recipe_json`)."""
    given = dict(_leaves(source.table))
    lines = _lines(source.text)
    settings = {}
    for keys, value in _leaves(json.loads(json.dumps(resolved))):
        settings[".".join(keys)] = Setting(value, _origin(keys, source, lines) if keys in given else DEFAULT)
    return settings


def not_default(settings: Settings) -> dict[str, Setting]:
    """Return the settings that the file or an override gives."""
    return {key: setting for key, setting in settings.items() if setting.origin != DEFAULT}


def _origin(keys: Keys, source: Overrides, lines: Mapping[Keys, int]) -> str:
    last = source.last_override(keys)
    if last is not None:
        return last.origin
    return f"{source.path}:{lines[keys]}" if keys in lines else source.path


def _leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield all values that are not sections. A list of tables is a section with numbers for keys."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    elif _is_list_of_tables(value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*keys, str(number)))
    elif keys:
        yield keys, value


def _is_list_of_tables(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and len(value) > 0 and all(isinstance(entry, Mapping) for entry in value)


def _lines(text: str) -> dict[Keys, int]:
    """Return the line on which each key of a TOML file begins, counted from 1; empty for a long file.

    The first lines of a file are valid TOML if and only if a statement ends there, so parsing each longer prefix shows
    which keys each statement adds.
    """
    pieces = text.split("\n")
    found: dict[Keys, int] = {}
    begins = 1
    for number in range(1, len(pieces) + 1) if len(pieces) <= MAX_LINES else ():
        try:
            so_far = tomllib.loads("\n".join([*pieces[:number], ""]))
        except tomllib.TOMLDecodeError:
            continue
        for keys, _ in _leaves(so_far):
            found.setdefault(keys, begins)
        begins = number + 1
    return found
