"""`python:package.module:function`: a data set returned by a user function.

The function is called as function(split), or function(split, root=...) if it has a parameter `root`, and returns
(images, labels), (images, labels, ids) or (images, labels, ids, class_names), as accepted by `list_arrays`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.stages.data.sources.listing import Listing, integer_column, list_arrays, numbered_classes
from kdpipe.stages.data.splits import Split
from kdpipe.stages.errors import DataError, cause
from kdpipe.stages.runtime.user_code import PREFIX, import_callable, user_code_context
from kdpipe.store.errors import KdpipeError


def list_python(reference: str, split: Split, *, root: Path) -> Listing:
    """List what the function `reference` ("package.module:function") returns for `split`.

    A test split without class names gets those of the train split, for which the function is called once more.

    Raises:
        DataError: The function does not exist, raises, or returns something else.
    """
    name = f"{PREFIX}{reference}"
    with user_code_context():
        function = import_callable(name, "data.name", DataError)
        images, labels, sample_ids, class_names = _call(name, function, split, root)
        if class_names is None and split == "test":
            train_labels = integer_column(name, "labels", _call(name, function, "train", root)[1])
            class_names = numbered_classes(name, train_labels)
    return list_arrays(name, images, labels, sample_ids, class_names=class_names)


def _call(name: str, function: Callable[..., Any], split: Split, root: Path) -> tuple[Any, Any, Any, Any]:
    try:
        returned = function(split, root=str(root)) if _takes_root(function) else function(split)
    except KdpipeError:
        raise
    except (Exception, SystemExit) as error:  # user code
        raise DataError(f"data set {name}: the function failed on {split!r} ({cause(error)}).") from error
    if not isinstance(returned, tuple | list) or not 2 <= len(returned) <= 4:
        raise DataError(
            f"data set {name}: the function must return (images, labels), (images, labels, ids) or "
            f"(images, labels, ids, class_names), found {type(returned).__name__}."
        )
    images, labels, sample_ids, class_names = (*returned, None, None)[:4]
    if class_names is not None:
        class_names = _class_names(name, class_names)
    return images, labels, sample_ids, class_names


def _takes_root(function: Callable[..., Any]) -> bool:
    try:
        return "root" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False


def _class_names(name: str, class_names: Any) -> tuple[str, ...]:
    if not isinstance(class_names, tuple | list | np.ndarray) or not all(
        isinstance(entry, str) for entry in class_names
    ):
        raise DataError(f"data set {name}: class_names must be strings, found {class_names!r}.")
    return tuple(str(entry) for entry in class_names)
