"""Registries of what users bring by name: losses, models, data sets, optimizers, schedules and callbacks.

A name in a recipe is that of a built-in object, of a registered one, or a `python:package.module:name` reference.
Installed packages register objects when the modules named by their entry points of the group `kdpipe.plugins` are
imported.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, overload

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.user_code import import_callable, is_user_reference, object_sha256, source_sha256
from kdpipe.store.errors import KdpipeError, did_you_mean

GROUP = "kdpipe.plugins"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Objects of one kind by name.

    Attributes:
        kind: What they are, for messages, such as "optimizer".
        key: The recipe key that names them, for messages.
        builtin: The built-in objects.
        error: The error for unknown names.
    """

    def __init__(self, kind: str, key: str, builtin: Mapping[str, T], error: type[KdpipeError] = RecipeError) -> None:
        self.kind, self.key, self.builtin, self.error = kind, key, builtin, error
        self._registered: dict[str, T] = {}

    @overload
    def register(self, name: T) -> T: ...
    @overload
    def register(self, name: str | None = None) -> Callable[[T], T]: ...
    def register(self, name: str | T | None = None) -> T | Callable[[T], T]:
        """Return a decorator that registers an object under `name`, by default its own.

        Registering the same object again, as a notebook does when a cell runs twice, replaces it.

        Raises:
            RecipeError: The name is invalid, or another object's.
        """
        if name is not None and not isinstance(name, str):
            return self.register()(name)

        def decorate(found: T) -> T:
            self.add(name or str(getattr(found, "__name__", "")), found)
            return found

        return decorate

    def add(self, name: str, found: T) -> None:
        """Register `found` under `name`. Raises as `register` does."""
        if not NAME.fullmatch(name):
            raise RecipeError(f"{name!r} cannot name a {self.kind}: use letters, digits and any of _.+- only.")
        known = self.builtin.get(name) or self._registered.get(name)
        if known is not None and (name in self.builtin or _qualified(known) != _qualified(found)):
            raise RecipeError(
                f"there is a {self.kind} called {name!r} already ({_qualified(known)}): register "
                f"{_qualified(found)} under another name."
            )
        self._registered[name] = found

    def get(self, name: str) -> T:
        """Return the object with this name, or that a `python:` reference names.

        Raises:
            KdpipeError: There is none; the message has the nearest names.
        """
        if is_user_reference(name):
            return import_callable(name, self.key, self.error)  # type: ignore[return-value]
        if name in self.builtin:
            return self.builtin[name]
        load_plugins()
        if name in self._registered:
            return self._registered[name]
        hint = did_you_mean(name, self.names(), limit=3, otherwise=f"available: {', '.join(self.names())}.")
        raise self.error(f"{self.key}: there is no {self.kind} {name[:80]!r}; {hint}")

    def names(self) -> list[str]:
        """Return all names: the built-in ones, then the registered ones."""
        load_plugins()
        return [*self.builtin, *self._registered]

    def registered(self) -> dict[str, T]:
        """Return the registered objects."""
        load_plugins()
        return dict(self._registered)

    def source_sha256(self, name: str) -> str | None:
        """Return the digest of the source of a user's object, which is part of what decides a job; None if built in.

        Raises:
            KdpipeError: Its source cannot be read, or there is no such object.
        """
        if name in self.builtin:
            return None
        if is_user_reference(name):
            return source_sha256(name, self.key, self.error)
        return object_sha256(self.get(name), f"{self.key}={name!r}", self.error)


@cache
def load_plugins() -> None:
    """Import the plug-ins of installed packages, once; a broken one is a warning, not an error."""
    for entry in _unique(entry_points(group=GROUP)):
        try:
            loaded = entry.load()
            if callable(loaded):
                loaded()
        except (Exception, SystemExit) as error:  # other people's code
            package = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f"the plug-in {entry.name} of the package {package} is left out, as it cannot be loaded "
                f"({cause(error)}): update or uninstall that package.",
                stacklevel=2,
            )


def _unique(entries: Iterable[Any]) -> list[Any]:
    """Return entry points without duplicates: an editable install may list one twice."""
    return list({(entry.name, entry.value): entry for entry in entries}.values())


def _qualified(found: Any) -> str:
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
