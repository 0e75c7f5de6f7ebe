"""What a recipe is made of before it is checked: its file's table, what the environment says, and what --set says."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.sentence import Keys, one_line
from stages.errors import RecipeError

PREFIX = "KDPIPE_"

MOST_BYTES = 2**22
"""Of a recipe's file; what is larger, or has no end, is something else."""

RESERVED = {
    "KDPIPE_CACHE": "the folder to which stores are staged (store.remote); the recipe's section of that name is "
    "KDPIPE_CACHE__STORE and so on",
    "KDPIPE_CACHE_BYTES": "how much may lie there",
}
"""Variables that kdpipe reads for itself, and what they are for: none of them is a recipe's key."""


@dataclass(frozen=True)
class Given:
    """A key with a value from elsewhere than the file. origin: "KDPIPE_SEED" or "--set"; shown: so in sentences."""

    keys: Keys
    origin: str
    shown: str


@dataclass(frozen=True)
class Layers:
    """A recipe's table with everything that overrides it. text: the file's own. given: in the order it was laid on."""

    path: str
    text: str
    table: dict[str, Any]
    given: tuple[Given, ...] = ()

    def giver(self, keys: Keys, with_below: bool = True) -> str:
        """Who gave what stands at `keys`, as sentences name it. with_below: an override of a key below counts too."""
        last = last_given(self.given, keys, with_below)
        return self.path if last is None else last.shown


def last_given(given: Iterable[Given], keys: Keys, with_below: bool = True) -> Given | None:
    """The last override that changed what stands at `keys`."""
    found = None
    for one in given:
        above = one.keys == keys[: len(one.keys)]
        below = with_below and keys == one.keys[: len(keys)]
        if above or below:
            found = one
    return found


def read_layers(path: Path, overrides: Iterable[str], environ: Mapping[str, str]) -> Layers:
    """The recipe at `path`, then the environment, then --set laid upon it. Raises RecipeError where a file cannot be
    read, or an override names no place.
    """
    try:
        with os.fdopen(_opened(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig") if len(content) <= MOST_BYTES else ""
        table = tomllib.loads(text)
    except OSError as error:
        why = f"cannot read the recipe {path} ({error.strerror})"
        raise RecipeError(one_line(f"{why}: name another, or have `kdpipe recipe new` write one.")) from error
    except (ValueError, RecursionError) as error:  # ValueErrors: no TOML, no UTF-8, a NUL in the path, endless numbers
        raise RecipeError(one_line(f"{path} is not valid TOML: {_first_line(error)}.")) from error
    if len(content) > MOST_BYTES:
        raise RecipeError(one_line(f"{path} is no recipe: it has more than {MOST_BYTES:,} bytes."))
    given = [_lay(table, keys, text, name, name) for name, keys, text in _environment(environ)]
    given += [_set(table, override) for override in overrides]
    return Layers(str(path), text, table, tuple(given))


def _opened(path: Path) -> int:
    """A descriptor of the file. A pipe that nobody writes into is empty, and is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return descriptor


def _environment(environ: Mapping[str, str]) -> list[tuple[str, Keys, str]]:
    """Name, keys and value of each variable that is about a recipe; sections before their keys.

    One that is empty counts as not set, as in shells' own ${NAME:-}: some batch systems have no other way to unset one.
    """
    found: dict[Keys, tuple[str, Keys, str]] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in RESERVED or not text.strip():
            continue
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if not all(keys):
            raise RecipeError(
                one_line(f"{name} names no key: write it as KDPIPE_STUDENT__TRAIN__LR, `__` between keys.")
            )
        if keys in found:
            raise RecipeError(one_line(f"{name} and {found[keys][0]} are the same key: unset one of them."))
        found[keys] = (name, keys, text)
    return sorted(found.values(), key=_depth_first)


def _depth_first(variable: tuple[str, Keys, str]) -> tuple[int, Keys]:
    return len(variable[1]), variable[1]


def _set(table: dict[str, Any], override: str) -> Given:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(one_line(f"--set takes key=value, such as student.train.lr=0.05, not {override[:80]!r}."))
    return _lay(table, tuple(key.strip().split(".")), text, "--set", f"--set {override[:80]}")


def _lay(table: dict[str, Any], keys: Keys, text: str, origin: str, shown: str) -> Given:
    """Put the value that `text` says at `keys`, making sections that are not there."""
    at: Any = table
    found: list[str] = []
    for parent in keys[:-1]:
        found.append(parent)
        if isinstance(at, list):
            found[-1] = str(_index(at, parent, shown))
            at = at[int(found[-1])]
        else:
            at = at.setdefault(parent, {})
        if not isinstance(at, dict | list):
            raise RecipeError(one_line(f"{shown}: {parent!r} is not a section."))
    last = _index(at, keys[-1], shown) if isinstance(at, list) else keys[-1]
    at[last] = _value(text.strip(), shown)
    return Given((*found, str(last)), origin, shown)


def _index(items: list[Any], number: str, shown: str) -> int:
    if number.isdecimal() and len(number) < 10 and int(number) < len(items):
        return int(number)
    known = f"0 to {len(items) - 1}" if items else "there is none"
    raise RecipeError(one_line(f"{shown}: {number!r} is not the number of an entry, {known}."))


def _value(text: str, shown: str) -> Any:
    """A TOML value; what is not one is a string, so that --set student.model.name=cnn needs no quotes."""
    try:
        text.encode("utf-8")
        table = tomllib.loads(f"value = {text}")
    except UnicodeEncodeError as error:
        raise RecipeError(one_line(f"{shown}: the value is not UTF-8 text.")) from error
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line break and another key do not make two keys


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
