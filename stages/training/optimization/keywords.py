"""Keywords of optimizers and schedules: each gets those that its signature names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kdpipe.stages.errors import RecipeError
from kdpipe.store.errors import did_you_mean


def named_keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `function` that can be given by keyword; `**kwargs` names none."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in inspect.signature(function).parameters.items() if one.kind in kinds}


def select_keywords(
    function: Callable[..., Any], offered: Mapping[str, Any], args: Mapping[str, Any], key: str, taken: Collection[str]
) -> dict[str, Any]:
    """Return those of `offered` that `function` names, with `args`, in which a list is a tuple.

    Args:
        function: An optimizer or a schedule.
        offered: What the recipe's ordinary keys say.
        args: The table of further keywords in the recipe.
        key: The key of that table, for messages.
        taken: Names that cannot be in `args`, as kdpipe or ordinary keys set them.

    Raises:
        RecipeError: One of `args` is taken, or not a keyword of `function`.
    """
    named = named_keywords(function)
    takes_any = any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())
    for name in args:
        if name in taken:
            raise RecipeError(f"{key}.{name}: leave it out; kdpipe sets it, from a key of its own if there is one.")
        if name not in named and not takes_any:
            known = sorted(set(named) - set(taken))
            raise RecipeError(f"{key}.{name}: there is no such argument; {did_you_mean(name, known)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return {**{name: value for name, value in offered.items() if name in named}, **given}
