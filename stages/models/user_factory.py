"""User-defined networks: `python:package.module:factory` as the model's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.arguments import call_with_args
from kdpipe.stages.runtime.user_code import import_callable, user_code_context


def build_from_factory(
    name: str, args: Mapping[str, Any], *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Call the user's factory and return its network: images [B, C, H, W] -> logits [B, num_classes].

    The factory receives `args` and those of num_classes, in_channels and image_size (height, width) that its signature
    accepts. Raises ModelError where it cannot be found or called, or returns no nn.Module.
    """
    offered = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    factory = import_callable(name, "model.name", ModelError)
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
