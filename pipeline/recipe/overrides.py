"""Read a recipe file with the overrides of the environment and of --set, and find the origin of each value."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.recipe.messages import Keys, one_line
from kdpipe.stages.errors import RecipeError
from kdpipe.store.redact import redacted

PREFIX = "KDPIPE_"
DEFAULT = "default"

MAX_BYTES = 2**22
"""The largest recipe file that is read."""

RESERVED = {
    "KDPIPE_CACHE": "the folder to which stores are staged; the recipe's section `cache` is set by KDPIPE_CACHE__STORE "
    "and so on",
    "KDPIPE_CACHE_BYTES": "the size limit of that folder",
    "KDPIPE_WORKSPACE": "the folder of runs that share teachers, stores and students, as --workspace",
    "KDPIPE_DIST_BACKEND": "how several processes send what is on GPUs: nccl or gloo",
}
"""Variables that kdpipe itself reads, and what they are for: they are not recipe keys."""


@dataclass(frozen=True)
class Override:
    """A key whose value does not come from the recipe file.

    Attributes:
        origin: "--set", or a variable's name such as "KDPIPE_SEED".
        shown: How messages name it, such as "--set seed=x".
    """

    keys: Keys
    origin: str
    shown: str


@dataclass(frozen=True)
class Overrides:
    """A recipe's table with all overrides applied.

    Attributes:
        table: The table after the overrides.
        given: The overrides, in the order in which they were applied.
    """

    path: str
    table: dict[str, Any]
    given: tuple[Override, ...] = ()

    def origin_of(self, keys: Keys) -> str:
        """Return the override or the file that set `keys`, as messages name it."""
        last = self.last_override(keys)
        return self.path if last is None else last.shown

    def last_override(self, keys: Keys) -> Override | None:
        """Return the last override of `keys`, of a section above them, or of a key below them."""
        related = (
            override
            for override in reversed(self.given)
            if all(key == other for key, other in zip(keys, override.keys, strict=False))
        )
        return next(related, None)


@dataclass(frozen=True)
class Setting:
    """The value of a key, and its origin: "default", "r.toml", "KDPIPE_SEED" or "--set"."""

    value: Any
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "origin": self.origin}


Settings = Mapping[str, Setting]
"""Settings by dotted key, such as "student.train.lr"; entries of lists of tables have numbers for keys."""


def settings_of(resolved: Mapping[str, Any], source: Overrides) -> Settings:
    """Return the value and origin of every key of a resolved recipe (`recipe_json`)."""
    given = dict(_leaves(source.table))
    settings = {}
    for keys, value in _leaves(json.loads(json.dumps(resolved))):
        last = source.last_override(keys)
        origin = last.origin if last else source.path
        is_given = any(
            keys[:length] in given for length in range(1, len(keys) + 1)
        )  # `operations = ["NAME"]` is a leaf
        settings[".".join(keys)] = Setting(value, origin if is_given else DEFAULT)
    return settings


def not_default(settings: Settings) -> dict[str, Setting]:
    """Return the settings that the file or an override gives."""
    return {key: setting for key, setting in settings.items() if setting.origin != DEFAULT}


def _leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield all values that are not sections. A list of tables is a section with numbers for keys."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, Mapping) for item in value):
        value = {str(number): item for number, item in enumerate(value)} or value
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    elif keys:
        yield keys, value


def read_with_overrides(path: Path, overrides: Iterable[str], environ: Mapping[str, str]) -> Overrides:
    """Read the recipe at `path` and apply the environment, then the `key=value` texts of --set.

    Raises:
        RecipeError: The file cannot be read, or an override does not name a key.
    """
    try:
        with os.fdopen(_open(path), "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig") if len(content) <= MAX_BYTES else ""
        table = tomllib.loads(text)
    except OSError as error:
        why = f"cannot read the recipe {path} ({error.strerror})"
        raise RecipeError(one_line(f"{why}: check the path, or write one with `kdpipe recipe new`.")) from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a NUL in the path, numbers too long
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise RecipeError(one_line(f"{path} is not valid TOML: {first_line}.")) from error
    if len(content) > MAX_BYTES:
        raise RecipeError(one_line(f"{path} is not a recipe: it is larger than {MAX_BYTES:,} bytes."))
    given = [_apply(table, keys, text, name, name) for name, keys, text in _from_environment(environ)]
    given += [_apply_set(table, override) for override in overrides]
    return Overrides(str(path), table, tuple(given))


def _open(path: Path) -> int:
    """Open the file without waiting for the writer of a named pipe, which then reads as empty."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return descriptor


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, Keys, str]]:
    """Return name, keys and value of each variable that sets a recipe key, sections before their keys.

    An empty variable counts as unset, like ${NAME:-} in shells: some batch systems cannot unset one.
    """
    found = []
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in RESERVED or not text.strip():
            continue
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if not all(keys):
            raise RecipeError(
                one_line(f"{name} does not name a key: put `__` between keys, as in KDPIPE_STUDENT__TRAIN__LR.")
            )
        found.append((name, keys, text))
    return sorted(found, key=lambda variable: (len(variable[1]), variable[1]))


def _apply_set(table: dict[str, Any], override: str) -> Override:
    key, equals, text = override.partition("=")
    shown = redacted(override)  # before it is cut, or half a password would stay
    if not equals or not key.strip():
        raise RecipeError(one_line(f"--set takes key=value, such as student.train.lr=0.05, not {shown[:80]!r}."))
    return _apply(table, tuple(key.strip().split(".")), text, "--set", f"--set {shown[:80]}")


def _apply(table: dict[str, Any], keys: Keys, text: str, origin: str, shown: str) -> Override:
    """Set `keys` of the table to the value of `text`, creating missing sections."""
    return Override(set_key(table, keys, _value(text.strip(), shown), shown), origin, shown)


def set_key(table: dict[str, Any], keys: Keys, value: Any, shown: str) -> Keys:
    """Set `keys` of a recipe's table, creating missing sections, and return them with plain numbers of entries.

    Raises:
        RecipeError: They lead into something that is not a section, or to an entry that does not exist.
    """
    section: Any = table
    found: list[str] = []
    for parent in keys[:-1]:
        found.append(parent)
        if isinstance(section, list):
            found[-1] = str(_index(section, parent, shown))
            section = section[int(found[-1])]
        else:
            section = section.setdefault(parent, {})
        if not isinstance(section, dict | list):
            raise RecipeError(one_line(f"{shown}: {parent!r} is not a section."))
    last = _index(section, keys[-1], shown) if isinstance(section, list) else keys[-1]
    section[last] = value
    return (*found, str(last))


def _index(items: list[Any], number: str, shown: str) -> int:
    if number.isdecimal() and len(number) < 10 and int(number) < len(items):
        return int(number)
    known = f"0 to {len(items) - 1}" if items else "the list is empty"
    raise RecipeError(one_line(f"{shown}: {number!r} is not the number of an entry ({known})."))


def _value(text: str, shown: str) -> Any:
    """Parse a TOML value; any other text is a string, so that --set student.model.name=cnn needs no quotes."""
    try:
        text.encode("utf-8")
        table = tomllib.loads(f"value = {text}")
    except UnicodeEncodeError as error:
        raise RecipeError(one_line(f"{shown}: the value is not UTF-8 text.")) from error
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line break and a second key do not set two keys
