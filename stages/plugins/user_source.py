"""The digest of the source of user code, which is part of the identity of what it makes."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.plugins.description import ClosureError, Description, own_bases, sha256_of
from kdpipe.stages.plugins.module_source import MAIN, is_library, modules_sha256
from kdpipe.store.errors import KdpipeError


def object_sha256(found: Any, where: str, error: type[KdpipeError], *, module: str | None = None) -> str:
    """Return the sha256 of the source of a user's class or function, to detect later edits.

    The file of its module counts, and those of the user's own modules that it imports, directly or not, at the top or
    within a function; libraries do not. Of an object defined in a notebook or script its own source counts, and the
    functions, classes and values there that it names. So do the values that it has from a function around it. A module
    that was edited after its import counts as it was, with a warning: that is the code that runs.

    Args:
        found: The object.
        where: What it is, to begin error messages with.
        error: The class of errors.
        module: The name of the imported module that it was found in, if known; its file counts too.

    Raises:
        KdpipeError: `error`, if there is no source, or it uses something whose changes could not be noticed.
    """
    own = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
    defined_in = str(getattr(own, "__module__", None))
    if module is None and isinstance(found, functools.partial):
        raise error(f"{where}: later edits of a functools.partial could not be noticed: write a function instead.")
    with _without_source(where, module or defined_in, error):
        if module is not None and module not in MAIN:
            return modules_sha256([module] if is_library(defined_in) else [module, defined_in])
        description = Description(strict=True)
        owner = found if own is not found else getattr(found, "__self__", None)
        if inspect.isclass(owner):  # of a class method
            description.code(owner)
        description.code(getattr(own, "__func__", own), defined_in)
        description.add_state(owner)
        return description.sha256()


OWN_CLASS = "_kdpipe_own_class"
"""Attribute of a class that kdpipe derived from a user's: the user's."""


def network_sha256(model: nn.Module) -> dict[str, str]:
    """Return the digests of a network object: of the source of its modules' own classes, and of their attributes.

    Weights do not count, nor attributes that are private, of other types than JSON's or functions, or set by `forward`.

    Raises:
        ModelError: A class or function has no source.
    """
    kind = type(model)
    with _without_source(f"the network {kind.__qualname__}", kind.__module__, ModelError):
        classes, values = Description(strict=False), Description(strict=False, tensors=False)
        kinds = (vars(type(module)).get(OWN_CLASS, type(module)) for module in model.modules())
        for own in own_bases(dict.fromkeys(kinds)):
            classes.code(own)
        firsts: dict[int, str] = {}
        parameters = model.named_parameters(remove_duplicate=False)
        tied = [(name, first) for name, one in parameters if (first := firsts.setdefault(id(one), name)) != name]
        modules = values.modules(model)
        structure = {"text": str(model), "modules": modules, "parts": values.parts, "tied": tied}
        return {"source_sha256": classes.sha256(), "structure_sha256": sha256_of(structure)}


@contextmanager
def _without_source(where: str, module: str, error: type[KdpipeError]) -> Iterator[None]:
    """Raise `error` where source is missing."""
    try:
        yield
    except ClosureError as caught:
        raise error(
            f"{where}: it uses {caught}, of the function around it, whose later changes could not be noticed: use "
            "numbers, strings, tensors, functions and classes there, or build it within."
        ) from caught
    except (OSError, TypeError) as caught:
        what = getattr(sys.modules.get(module), "__file__", None) or "its module"
        raise error(
            f"{where}: later edits of its source could not be noticed, since {what} cannot be read "
            f"({cause(caught)}): put it in a file of your own."
        ) from caught
