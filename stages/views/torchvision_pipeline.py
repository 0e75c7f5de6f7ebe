"""Build pipelines of torchvision.transforms.v2 from a recipe's tables or a user function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import nn
from torchvision.transforms import v2

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.user_code import import_callable, user_code_context
from kdpipe.stages.views.config import OPERATIONS
from kdpipe.stages.views.global_rng import preserve_rng_state, seed_global_rngs
from kdpipe.store.errors import did_you_mean

Transform: TypeAlias = Callable[[Any], Any]

_BOXES = "works on bounding boxes or key points, not on images"
_SEVERAL = "returns several images, and a view is one image"
_NOT_IN_A_TABLE = "takes arguments that a recipe cannot hold: use views.transform = 'python:MODULE:FUNCTION'"
_REJECTED = {
    "MixUp": "mixes samples: use [views.mix]",
    "CutMix": "mixes samples: use [views.mix]",
    "Normalize": "belongs to teacher.mean/std and student.mean/std: views are not normalized",
    "ClampBoundingBoxes": _BOXES,
    "ClampKeyPoints": _BOXES,
    "ConvertBoundingBoxFormat": _BOXES,
    "RandomIoUCrop": _BOXES,
    "SanitizeBoundingBoxes": _BOXES,
    "SanitizeKeyPoints": _BOXES,
    "SetClampingMode": _BOXES,
    "UniformTemporalSubsample": "works on videos, not on images",
    "FiveCrop": _SEVERAL,
    "TenCrop": _SEVERAL,
    "Lambda": _NOT_IN_A_TABLE,
    "LinearTransformation": _NOT_IN_A_TABLE,
}
"""Classes of torchvision.transforms.v2 that no recipe can use, and the reason."""

_DTYPES = ("uint8", "float16", "bfloat16", "float32", "float64")

_ENUMS: dict[str, dict[str, Any]] = {
    "interpolation": {mode.value: mode for mode in v2.InterpolationMode},
    "policy": {policy.value: policy for policy in v2.AutoAugmentPolicy},
    "dtype": {name: getattr(torch, name) for name in _DTYPES},
}
"""Arguments that are objects in Python and strings in a recipe."""


def build_transform(
    operations: Sequence[Mapping[str, Any]], reference: str | None = None, where: str = OPERATIONS
) -> Transform:
    """Build the pipeline of the operations at a key of a recipe, or of `views.transform`, a "python:..." reference.

    The result is for `apply_transform` of the transforms engine. Raises RecipeError for invalid tables or references.
    """
    if reference is None:
        pipeline: Transform = v2.Compose(_build_all(operations, where)) if operations else v2.Identity()
        return pipeline
    if operations:
        raise RecipeError("views.operations and views.transform both define a pipeline: remove one of them.")
    return _from_reference(reference)


def _from_reference(reference: str) -> Transform:
    key = f"views.transform={reference!r}"
    with user_code_context(), preserve_rng_state():
        seed_global_rngs(0, sample_id=0, view=0)  # numbers drawn while building are the same in every process
        found = import_callable(reference, "views.transform", RecipeError)
        if isinstance(found, nn.Module):
            return found
        try:
            transform = found()
        except Exception as error:  # user code
            raise RecipeError(
                f"{key}: the function failed ({cause(error)}); it is called once, without arguments, and must return "
                "the pipeline."
            ) from error
    if not callable(transform):
        raise RecipeError(
            f"{key}: the function returned {type(transform).__name__}, expected a pipeline, such as "
            "torchvision.transforms.v2.Compose([...])."
        )
    return transform  # type: ignore[no-any-return]


def _build_all(tables: Any, where: str) -> list[Transform]:
    if not isinstance(tables, Sequence) or isinstance(tables, str):
        raise RecipeError(f"{where}: expected a list of tables such as [{{ name = 'RandomCrop', size = 32 }}].")
    return [_build(table, f"{where}.{number}") for number, table in enumerate(tables)]


def _build(table: Any, where: str) -> Transform:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise RecipeError(f"{where}: expected a table such as {{ name = 'RandomCrop', size = 32 }}, found {table!r}.")
    name = table["name"]
    kind = _kind(name, where)
    arguments = {key: value for key, value in table.items() if key != "name"}
    _check_names(kind, arguments, where)
    converted = {key: _convert(key, value, f"{where}: {name}", where) for key, value in arguments.items()}
    try:
        return kind(**converted)  # type: ignore[no-any-return]
    except Exception as error:  # torchvision raises many types
        raise RecipeError(f"{where}: {name} cannot be built from {arguments} ({cause(error)}).") from error


def _kind(name: str, where: str) -> Any:
    if name in _REJECTED:
        raise RecipeError(f"{where}: {name} {_REJECTED[name]}.")
    if name not in _transforms():
        hint = did_you_mean(name, _transforms(), otherwise="see its documentation.")
        raise RecipeError(f"{where}: torchvision.transforms.v2 has no transform {name!r}; {hint}")
    return _transforms()[name]


@cache
def _transforms() -> dict[str, Any]:
    public = {name: kind for name, kind in vars(v2).items() if inspect.isclass(kind) and not name.startswith("_")}
    return {
        name: kind
        for name, kind in public.items()
        if issubclass(kind, v2.Transform) and kind is not v2.Transform and name not in _REJECTED
    }


def _check_names(kind: Any, arguments: Mapping[str, Any], where: str) -> None:
    known = inspect.signature(kind).parameters
    for key in arguments:
        if key not in known:
            raise RecipeError(f"{where}: {kind.__name__} has no argument {key!r}; {did_you_mean(key, known)}")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise RecipeError(f"{where}: {kind.__name__} requires {key!r}.")


def _convert(key: str, value: Any, what: str, where: str) -> Any:
    """Convert a recipe's value for torchvision: nested tables to transforms, lists to tuples, names to objects."""
    if key == "transforms":
        return _build_all(value, f"{where}.transforms")
    if isinstance(value, list):
        return tuple(value)
    choices = _ENUMS.get(key)
    if choices is None or not isinstance(value, str):
        return value
    if value not in choices:
        raise RecipeError(f"{what} has no {key} {value!r}; {did_you_mean(value, choices)}")
    return choices[value]
