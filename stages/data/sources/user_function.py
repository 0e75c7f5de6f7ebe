"""Data sets that users bring: functions that are registered, or named as `python:package.module:function`.

The function is called as function(split), or function(split, root=...) if it names a parameter `root`, and returns
(images, labels), (images, labels, ids) or (images, labels, ids, class_names), as accepted by `list_arrays`; or a
map-style torch Dataset, as accepted by `list_torch_dataset`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.stages.data.names import TORCHVISION_NAMES
from kdpipe.stages.data.sources.image_folder import list_image_folder
from kdpipe.stages.data.sources.listing import Listing, integer_column, list_arrays, numbered_classes
from kdpipe.stages.data.sources.npz import list_npz
from kdpipe.stages.data.sources.torch_dataset import is_torch_dataset, list_torch_dataset
from kdpipe.stages.data.sources.torchvision import list_digits, list_torchvision
from kdpipe.stages.data.splits import Split
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import DataError, UnknownDataError, cause
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.plugins.user_code import import_callable, is_user_reference, user_code_context
from kdpipe.store.errors import KdpipeError

_BUILTIN: dict[str, Callable[..., Any]] = {
    "digits": list_digits,
    **{name: partial(list_torchvision, name) for name in TORCHVISION_NAMES},
    "imagefolder": list_image_folder,
    "npz": list_npz,
}

DATASETS: Registry[Callable[..., Any]] = Registry("data set", "data.name", _BUILTIN, UnknownDataError)
"""Functions of a split by name."""


def is_user_dataset(name: str) -> bool:
    """Return whether a data set is a user's: registered, or a `python:` reference."""
    return is_user_reference(name) or (name not in _BUILTIN and name in DATASETS.registered())


def list_user_dataset(
    name: str,
    split: Split,
    *,
    root: Path,
    size: int | None = None,
    channels: int | None = None,
    task: Task = CLASSIFICATION,
    **options: Any,
) -> Listing:
    """List what the user's function `name` returns for `split`.

    A test split without class names gets those of the train split, for which the function is called once more.

    Args:
        name: A registered name, or "python:package.module:function".
        split: The split.
        root: The recipe's `data.root`.
        size: The side to which the images of a torch Dataset, which may be of unequal sizes, are resized.
        channels: The number of channels to which they are converted.
        task: What the labels are: of other tasks than classification they are numbers [N, K].
        **options: Further ones of `list_torch_dataset`.

    Raises:
        DataError: The function does not exist, raises, or returns something else.
    """
    with user_code_context():
        function = import_callable(name, DATASETS.key, DataError) if is_user_reference(name) else DATASETS.get(name)
        returned = _call(name, function, split, root)
        if is_torch_dataset(returned):
            return list_torch_dataset(returned, name, image_size=size, channels=channels, task=task, **options)
        images, labels, sample_ids, class_names = _columns(name, returned)
        if class_names is None and split == "test" and task == CLASSIFICATION:
            train_labels = integer_column(name, "labels", _columns(name, _call(name, function, "train", root))[1])
            class_names = numbered_classes(name, train_labels)
    return list_arrays(name, images, labels, sample_ids, class_names=class_names, task=task)


def _call(name: str, function: Callable[..., Any], split: Split, root: Path) -> Any:
    try:
        return function(split, root=str(root)) if _names_root(function) else function(split)
    except KdpipeError:
        raise
    except (Exception, SystemExit) as error:  # user code
        raise DataError(f"data set {name}: the function failed on {split!r} ({cause(error)}).") from error


def _columns(name: str, returned: Any) -> tuple[Any, Any, Any, Any]:
    """Return images, labels, ids and class names, the last two None where the function returned none."""
    if not isinstance(returned, tuple | list) or not 2 <= len(returned) <= 4:
        raise DataError(
            f"data set {name}: the function must return (images, labels), (images, labels, ids) or "
            f"(images, labels, ids, class_names), or a map-style torch Dataset, found {type(returned).__name__}."
        )
    images, labels, sample_ids, class_names = (*returned, None, None)[:4]
    if class_names is not None:
        class_names = _class_names(name, class_names)
    return images, labels, sample_ids, class_names


def _names_root(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("root")
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _class_names(name: str, class_names: Any) -> tuple[str, ...]:
    if not isinstance(class_names, tuple | list | np.ndarray) or not all(
        isinstance(entry, str) for entry in class_names
    ):
        raise DataError(f"data set {name}: class_names must be strings, found {class_names!r}.")
    return tuple(str(entry) for entry in class_names)
