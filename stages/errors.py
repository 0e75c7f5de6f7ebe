"""Errors that a user can fix, and the exception for an early stop."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kdpipe.store.errors import KdpipeError

ANOTHER_RUN = "another run folder (--run; in Python run=)"
"""Part of the advice of messages."""


class RecipeError(KdpipeError):
    """The recipe asks for something that does not exist or does not fit together."""


class RunError(KdpipeError):
    """A run folder is damaged, or lacks the results of an earlier stage."""


class DataError(KdpipeError):
    """The data set is missing, empty, damaged, or does not match the recipe."""


class ModelError(KdpipeError):
    """A model cannot be built, loaded, hooked, pruned, quantized or exported as asked."""


class UnknownModelError(ModelError, RecipeError):
    """The recipe names a network, or an argument of one, that does not exist."""


class NotLogitsError(ModelError, RecipeError):
    """A network returns probabilities where logits are wanted."""


class UnknownDataError(DataError, RecipeError):
    """The recipe names a data set that does not exist."""


class NotFiniteError(KdpipeError):
    """A network returned NaN or infinity."""


class StoppedEarly(BaseException):  # not an error: rerunning the command continues the work
    """The job was asked to stop and its progress is saved; the text is the reason, as in "at SIGTERM"."""


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """Return the first of these names, and "..." if there are more, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def cause(error: BaseException) -> str:
    """Return another library's error, type and text, as one line of at most 300 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=300, placeholder=" ...")
