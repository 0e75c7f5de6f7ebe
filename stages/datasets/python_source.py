"""`python:package.module:function`: a data set that the user's own function hands over.

The function is called as function(split), or function(split, root=...) if it has a parameter `root`, and returns
(images, labels), (images, labels, ids) or (images, labels, ids, class_names), as `list_arrays` takes them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.cause import cause
from stages.datasets.listing import Listing, integer_column, list_arrays, numbered_classes
from stages.datasets.split import Split
from stages.errors import DataError
from store.errors import KdpipeError


def list_python(reference: str, split: Split, *, root: Path) -> Listing:
    """List what the function `reference` ("package.module:function") returns for `split`.

    A test split without class names has those of the train split, for which the function is called once more.
    DataError if there is no such function, if it raises, or if what it returns has the wrong form.
    """
    name = f"python:{reference}"
    with _current_folder_importable(), contextlib.redirect_stdout(sys.stderr):  # stdout is for results only
        function = _find(name, reference)
        images, labels, sample_ids, class_names = _call(name, function, split, root)
        if class_names is None and split == "test":
            train_labels = integer_column(name, "labels", _call(name, function, "train", root)[1])
            class_names = numbered_classes(name, train_labels)
    return list_arrays(name, images, labels, sample_ids, class_names=class_names)


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    before, sys.path = sys.path, [*sys.path, str(Path.cwd())]
    try:
        yield
    finally:
        sys.path = before


def _find(name: str, reference: str) -> Callable[..., Any]:
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise DataError(f"data.name={name!r} must read python:package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it runs the user's own code
        raise DataError(
            f"data.name={name!r}: the module {module_name} cannot be imported ({cause(error)}); "
            f"it is looked for on sys.path and in {Path.cwd()}."
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, vars(module), n=3)
        advice = f"; did you mean {' or '.join(near)}?" if near else "."
        raise DataError(f"data.name={name!r}: {module_name} has no function {function_name}{advice}")
    return function


def _call(name: str, function: Callable[..., Any], split: Split, root: Path) -> tuple[Any, Any, Any, Any]:
    try:
        returned = function(split, root=str(root)) if _takes_root(function) else function(split)
    except KdpipeError:
        raise
    except Exception as error:  # it is the user's own code
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
    if not isinstance(class_names, tuple | list | np.ndarray) or not all(isinstance(each, str) for each in class_names):
        raise DataError(f"data set {name}: class_names must be strings, found {class_names!r}.")
    return tuple(str(each) for each in class_names)
