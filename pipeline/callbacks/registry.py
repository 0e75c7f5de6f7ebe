"""Callbacks by name: check those of a recipe, and build them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from kdpipe.pipeline.callbacks.files import CSVLogger, TensorBoardLogger
from kdpipe.pipeline.callbacks.tracker import SETTINGS, Tracker
from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.runtime.callbacks import Callback
from kdpipe.store.errors import did_you_mean

CALLBACKS: Registry[Callable[..., Callback]] = Registry(
    "callback",
    "callbacks",
    {"csv": CSVLogger, "tensorboard": TensorBoardLogger, **{name: partial(Tracker, name) for name in SETTINGS}},
)
"""Built-in and registered callbacks: classes, or functions that return a callback."""


def _named(entry: str | dict[str, Any]) -> str | dict[str, Any]:
    name = entry.get("name") if isinstance(entry, dict) else entry
    if not isinstance(name, str) or not name:
        raise ValueError("it needs the name of a callback, as in { name = 'csv' }")
    return entry


CallbackEntry = Annotated[str | dict[str, Any], Field(union_mode="left_to_right"), AfterValidator(_named)]
"""A callback in a recipe: its name, or a table of its name and arguments."""


def callback_faults(entries: Sequence[str | Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with the callbacks of a recipe; `python:` modules are imported, and nothing is called."""
    for number, entry in enumerate(entries):
        try:
            _checked(entry, f"callbacks.{number}")
        except RecipeError as error:
            yield str(error)


def build_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> tuple[Callback, ...]:
    """Build the callbacks of a recipe.

    Raises:
        RecipeError: A name or an argument is unknown, an argument is missing, or a callback cannot be built.
    """
    return tuple(_build(entry, f"callbacks.{number}") for number, entry in enumerate(entries))


def _build(entry: str | Mapping[str, Any], key: str) -> Callback:
    make, name, arguments = _checked(entry, key)
    try:
        made = make(**arguments)
    except Exception as error:  # a user's code
        raise RecipeError(f"{key} ({name}) cannot be built ({cause(error)}): correct it or its arguments.") from error
    if not isinstance(made, Callback):
        raise RecipeError(f"{key} ({name}) is a {type(made).__name__}, not a callback: derive it from kdpipe.Callback.")
    return made


def _checked(entry: str | Mapping[str, Any], key: str) -> tuple[Callable[..., Callback], str, dict[str, Any]]:
    """Return what makes a callback, its name and its arguments, which fit. Raises RecipeError otherwise."""
    if not isinstance(entry, str | Mapping):
        raise RecipeError(f"{key} is {entry!r:.80}: give a callback object, a name, or a table of name and arguments.")
    arguments = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = str(arguments.pop("name", ""))
    make = CALLBACKS.get(name)
    parameters = inspect.signature(make).parameters
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [each for each, parameter in parameters.items() if parameter.kind in by_keyword]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for each in () if takes_any else arguments:
        if each not in known:
            raise RecipeError(
                f"{key}: {name} has no argument {each!r}; {did_you_mean(each, known) if known else 'it takes none.'}"
            )
    for each in known:
        if parameters[each].default is inspect.Parameter.empty and each not in arguments:
            raise RecipeError(
                f"{key}: {name} needs the argument {each!r}: give it, as in {{ name = ..., {each} = ... }}."
            )
    return make, name, arguments
