"""Networks that users bring: registered factories and `python:package.module:factory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, RecipeError, UnknownModelError, cause
from kdpipe.stages.models.arguments import call_with_args
from kdpipe.stages.models.libraries.torchvision import classifier_names
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.plugins.user_code import import_callable, is_user_reference, user_code_context

Factory = Callable[..., nn.Module]


class _ModelRegistry(Registry[Factory]):
    def add(self, name: str, found: Factory) -> None:
        if name in classifier_names():
            raise RecipeError(f"torchvision has a model called {name!r}: register yours under another name.")
        super().add(name, found)


_BUILTIN: dict[str, Factory] = {name: network.build for name, network in SMALL_IMAGE_NETWORKS.items()}

MODELS = _ModelRegistry("model", "model.name", _BUILTIN, UnknownModelError)
"""Factories by name; one is called with those of num_classes, in_channels and image_size that it names, and `args`."""


def is_user_model(name: str) -> bool:
    """Return whether a network is a user's: registered, or a `python:` reference."""
    return is_user_reference(name) or (name not in SMALL_IMAGE_NETWORKS and name in MODELS.registered())


def build_user_model(name: str, args: Mapping[str, Any], offered: Mapping[str, Any]) -> nn.Module:
    """Call the user's factory with `args`, and with those of `offered` that it names.

    Raises ModelError if there is none, it fails, or it returns no module.
    """
    factory = import_callable(name, MODELS.key, ModelError) if is_user_reference(name) else MODELS.get(name)
    try:
        with user_code_context():
            model = call_with_args(name, factory, offered, args)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything
        raise ModelError(f"{name} failed ({cause(error)}).") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, wanted a torch.nn.Module.")
    return model


def model_source_sha256(name: str) -> str | None:
    """Return the digest of the source of a user's network; None for a built-in one. Raises ModelError without source.

    It is part of the network's identity: an edited network is another one.
    """
    return MODELS.source_sha256(name) if is_user_model(name) else None
