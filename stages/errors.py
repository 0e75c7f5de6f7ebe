"""The faults of a stage that a user can mend, and the one that is no fault: being asked to stop."""

from __future__ import annotations

from store.errors import KdpipeError


class RecipeError(KdpipeError):
    """The recipe asks for something that does not exist or does not fit together."""


class RunError(KdpipeError):
    """A run folder is damaged, or an earlier stage has not left in it what this one needs."""


class DataError(KdpipeError):
    """The data set is missing, empty, damaged, or not what the recipe says."""


class ModelError(KdpipeError):
    """A model cannot be built, loaded, hooked, pruned, quantized or exported as asked."""


class UnknownModelError(ModelError, RecipeError):
    """The recipe names a network, or an argument of one, that does not exist."""


class UnknownDataError(DataError, RecipeError):
    """The recipe names a data set that does not exist."""


class NotFiniteError(KdpipeError):
    """A network gave NaN or infinity: nothing good can come of going on."""


class StoppedEarly(BaseException):  # not an error, nor to be taken for one: the same command goes on with the work
    """The job was asked to stop, and everything done so far is saved. Its text says why, as in "at SIGTERM"."""
