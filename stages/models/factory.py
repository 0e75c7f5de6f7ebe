"""A network of the user's own: `python:package.module:factory` in place of a model's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from stages.cause import cause
from stages.errors import ModelError
from stages.models.arguments import call_with_args
from stages.python_reference import users_code

PREFIX = "python:"


def build_from_factory(
    name: str, args: Mapping[str, Any], *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """What the factory that `name` points to returns: images [B, C, H, W] -> logits [B, num_classes].

    It is called with `args` and with those of num_classes, in_channels and image_size (height, width) that its
    signature takes. Raises ModelError where it cannot be found or called, or returns no nn.Module.
    """
    offered = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        with users_code():
            model = call_with_args(name, _find(name), offered, args)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything
        raise ModelError(f"{name} failed ({cause(error)}).") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, wanted a torch.nn.Module.")
    return model


def _find(name: str) -> Callable[..., Any]:
    module_path, _, attribute = name.removeprefix(PREFIX).partition(":")
    if not module_path or not attribute:
        raise ModelError(f"{name!r} names no factory: write python:package.module:factory.")
    try:
        module = importlib.import_module(module_path)
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything
        raise ModelError(
            f"{name}: importing {module_path} failed ({cause(error)}); its folder must be on PYTHONPATH."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        found = "has no" if factory is None else "has an uncallable"
        where = getattr(module, "__file__", None) or "built in"
        raise ModelError(f"{name}: {module_path} ({where}) {found} {attribute!r}.")
    return factory  # type: ignore[no-any-return]
