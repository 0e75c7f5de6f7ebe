"""Arguments of the Python API: one form of what may be given in several, and one sentence for what is none of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdpipe.runs import CallbackLike, RunOptions
from kdpipe.stages.config import whole_number
from kdpipe.stages.errors import RecipeError, RunError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.registry import loss_class
from kdpipe.stages.models.normalization import Normalization, Numbers, as_normalization
from kdpipe.stages.runtime.callbacks import Callback
from kdpipe.stages.runtime.gpu.device import check_device
from kdpipe.stages.targets.feature_spec import FeatureSpec, parse_feature
from kdpipe.stages.views.config import Views
from kdpipe.store import make_folders

Scaling = Normalization | tuple[Numbers, Numbers]
LossLike = Loss | str | Mapping[str, Any]


def as_list(given: Any) -> tuple[Any, ...]:
    """Return a list as a tuple; a single value as one of its own, None as an empty one."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def as_losses(given: LossLike | Sequence[LossLike] | None) -> tuple[Loss, ...]:
    """Return losses as objects; a name or an entry builds one. Raises RecipeError for others."""
    return tuple(map(_loss, as_list(given)))


def _loss(given: Any) -> Loss:
    if isinstance(given, Loss):
        return given
    settings: dict[str, Any] = {"loss": given} if isinstance(given, str) else {}
    settings |= given if isinstance(given, Mapping) else {}
    if "loss" in settings:
        return loss_class(settings.pop("loss"))(**settings)
    advice = ""
    if isinstance(given, type) and issubclass(given, Loss):
        advice = f": build it, {given.__name__}()"
    elif inspect.isfunction(given) or (isinstance(given, type) and issubclass(given, nn.Module)):
        advice = ": decorate it with kdpipe.register_loss"
    wanted = "an object of kdpipe.losses, a name, or a table with the key loss"
    raise RecipeError(f"a loss is {wanted}, not {shown(given)}{advice}.")


def as_callbacks(given: CallbackLike | Sequence[CallbackLike] | None) -> tuple[CallbackLike, ...]:
    """Return callbacks as a tuple. Raises RecipeError for what is neither an object, a name nor a table."""
    for one in (found := as_list(given)):
        if not isinstance(one, Callback | str | Mapping):
            is_class = isinstance(one, type) and issubclass(one, Callback)
            advice = f": build it, {one.__name__}()" if is_class else ": derive a class from kdpipe.Callback"
            raise RecipeError(f"a callback is a Callback object, a name or a table, not {shown(one)}{advice}.")
    return found


def as_features(given: str | Sequence[str] | None) -> list[FeatureSpec]:
    """Return features by name. Raises RecipeError for others."""
    names = as_list(given)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise RecipeError(f"features are module paths such as 'stage2', not {shown(wrong[0])}.")
    return [parse_feature(name, "features") for name in names]


def as_views(given: Views | None) -> Views:
    """Return the views, by default one without augmentation. Raises RecipeError for other types."""
    if given is None:
        return Views(1)
    if not isinstance(given, Views):
        raise RecipeError(
            f"views are kdpipe.Views(num_views, operations), as Views(8, ['RandomCrop']), not {shown(given)}."
        )
    return given


def as_settings(
    name: str, given: Mapping[str, Any] | None, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return settings by key, numbers of numpy as Python's.

    Args:
        name: The argument's name.
        given: The settings.
        elsewhere: Keys that are given in another way, and the way.

    Raises:
        RecipeError: It is no mapping, or has one of these keys.
    """
    if not isinstance(given, Mapping | None):
        raise RecipeError(f"{name} is {shown(given)}: give a dict of settings by name.")
    for key in given or ():
        if key in (elsewhere or {}):
            raise RecipeError(f"{name} has no key {key!r} in Python: give {(elsewhere or {})[key]}.")
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in (given or {}).items()}


def as_scaling(
    normalize: Scaling | None, mean: Numbers | None, std: Numbers | None, in_channels: int
) -> Normalization | None:
    """Return the input scaling, None if none is given. Raises RecipeError if it is incomplete, double, or wrong."""
    if mean is None and std is None:
        return None if normalize is None else as_normalization(normalize, in_channels)
    if normalize is not None or mean is None or std is None:
        raise RecipeError("mean and std must be given together, without normalize=, or as normalize=(mean, std).")
    return as_normalization((mean, std), in_channels, name="(mean, std)")


def as_run_options(
    run: str | Path | None,
    device: str | torch.device,
    num_workers: int | None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = (),
) -> RunOptions:
    """Return the arguments that all functions share. Raises RecipeError or RunError for wrong ones."""
    folder = None if run is None else as_folder("run", run)
    workers = None if num_workers is None else whole_number("num_workers", num_workers)
    return RunOptions(folder, check_device(device), workers, progress, as_callbacks(callbacks))


def as_path(name: str, given: str | Path) -> Path:
    """Return an absolute path. Raises RunError for other types and for an empty name."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise RunError(f"{name} is {shown(given)}: give a path.")
    return Path(given).expanduser().absolute()


def as_folder(name: str, given: str | Path) -> Path:
    """Return the absolute path of a folder, which need not exist. Raises RunError if a file is in its place."""
    path = as_path(name, given)
    if file := next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None):
        raise RunError(f"{name} is {str(given)!r}, and {file} is no folder: choose another name.")
    return path


def as_file(name: str, given: str | Path) -> Path:
    """Return the absolute path of a file to write, in a folder that is there now. Raises RunError if it cannot be."""
    path = as_path(name, given)
    if path.is_dir():
        raise RunError(f"{name} is {str(given)!r}, a folder: name a file, such as {path / 'name.ext'}.")
    try:
        make_folders([as_folder(name, path.parent)])
    except OSError as error:
        raise RunError(f"{name} is {str(given)!r}, and its folder cannot be created: {error.strerror}.") from error
    return path


def shown(given: object) -> str:
    """Return what a message shows of an argument: a name, or the beginning of its repr, in one line."""
    return given.__name__ if isinstance(given, type) or inspect.isroutine(given) else " ".join(repr(given)[:60].split())
