"""Arguments of a network, checked against its signature before it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kdpipe.stages.errors import UnknownModelError

MAX_SIZE = 2**16
"""The largest number of channels, units or stages."""

BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call_with_args(
    network: str, factory: Callable[..., Any], offered: Mapping[str, Any], args: Mapping[str, Any]
) -> Any:
    """Call `factory` with those of `offered` that its signature names, and with all of `args`.

    `**kwargs` takes `args` only. Raises UnknownModelError for an unknown argument, naming the accepted ones, and for a
    missing one.
    """
    parameters = inspect.signature(factory).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind in BY_KEYWORD}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    fitting = {name: value for name, value in offered.items() if name in named}
    refuse_unknown_args(network, args, None if takes_any else named - set(offered), fitting)
    required = {name for name in named if parameters[name].default is inspect.Parameter.empty}
    if missing := sorted(required - set(fitting) - set(args)):
        raise UnknownModelError(f"{network} needs args.{missing[0]}: set it under the model's args.")
    return factory(**fitting, **args)


def refuse_unknown_args(
    network: str, args: Mapping[str, Any], accepted: set[str] | None, offered: Collection[str]
) -> None:
    """Raise UnknownModelError for the first of `args` that kdpipe sets itself or is not accepted (None: all are)."""
    for name in args:
        if name in offered:
            raise UnknownModelError(f"{network}: args.{name} is set by kdpipe itself; leave it out.")
        if accepted is not None and name not in accepted:
            takes = f"takes {', '.join(sorted(accepted))}" if accepted else "takes none"
            raise UnknownModelError(f"{network} has no argument {name!r}: it {takes}.")


def at_least_one(network: str, name: str, value: Any) -> int:
    """Return `value` if it is an integer of 1 or more; else raise UnknownModelError."""
    if type(value) is not int or value < 1:
        raise UnknownModelError(f"{network}: args.{name} must be an integer of 1 or more, found {value!r}.")
    if value > MAX_SIZE:
        raise UnknownModelError(f"{network}: args.{name} is more than {MAX_SIZE:,}: no network is that large.")
    return value
