"""How a network's own arguments reach it: checked against its signature before it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from stages.errors import UnknownModelError

MOST = 2**16
"""Of channels, units or stages."""

BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call_with_args(
    network: str, factory: Callable[..., Any], offered: Mapping[str, Any], args: Mapping[str, Any]
) -> Any:
    """Call `factory` with those of `offered` that its signature takes, and with all of `args`.

    Raises UnknownModelError, naming what `network` accepts, for an argument that it does not, and for one left out.
    """
    parameters = inspect.signature(factory).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind in BY_KEYWORD}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    refuse_unknown_args(network, args, None if takes_any else named - set(offered), offered)
    required = {name for name in named if parameters[name].default is inspect.Parameter.empty}
    if missing := sorted(required - set(offered) - set(args)):
        raise UnknownModelError(f"{network} needs args.{missing[0]}: set it under the model's args.")
    fitting = {name: value for name, value in offered.items() if takes_any or name in named}
    return factory(**fitting, **args)


def refuse_unknown_args(
    network: str, args: Mapping[str, Any], accepted: set[str] | None, offered: Collection[str]
) -> None:
    """Raise UnknownModelError for the first of `args` that kdpipe sets itself or `accepted` lacks (None: has all)."""
    for name in args:
        if name in offered:
            raise UnknownModelError(f"{network}: args.{name} is set by kdpipe itself; leave it out.")
        if accepted is not None and name not in accepted:
            takes = f"takes {', '.join(sorted(accepted))}" if accepted else "takes none"
            raise UnknownModelError(f"{network} has no argument {name!r}: it {takes}.")


def at_least_one(network: str, name: str, value: Any) -> int:
    """`value`, if it is a whole number of 1 or more; else UnknownModelError."""
    if type(value) is not int or value < 1:
        raise UnknownModelError(f"{network}: args.{name} must be a whole number of 1 or more, found {value!r}.")
    if value > MOST:
        raise UnknownModelError(f"{network}: args.{name} is more than {MOST:,}: no network is that large.")
    return value
