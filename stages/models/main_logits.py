"""What networks of users return: more than their logits, or others for the same image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.hooks import snapshot
from kdpipe.stages.plugins.user_source import OWN_CLASS

T = TypeVar("T")

EMBEDDINGS = ("image_embeds", "pooler_output")
"""What networks of transformers without a classifier call an image's embedding; else it is their class token."""

TOLERANCE = 1e-3
"""How far the logits of an image may differ, as a share of the largest: far more than rounding does."""


def main_logits(output: Any) -> Any:
    """Return the main logits of what a network returns: its `logits`, the first of a tuple or list, or itself.

    Of a network of transformers without a classifier it is the embedding.
    """
    if isinstance(output, Tensor | fx.Proxy):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    for key in EMBEDDINGS:
        if getattr(output, key, None) is not None:
            return getattr(output, key)
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state[:, 0]
    return output[0] if isinstance(output, tuple | list) and output else output


def returns_more(model: nn.Module) -> bool:
    """Return whether `keep_main_logits` found that a network returns more than logits."""
    return hasattr(model, OWN_CLASS)


def keep_main_logits(
    name: str, model: nn.Module, image_shape: tuple[int, int, int], notify: Callable[[str], None]
) -> None:
    """Let `model` return its main logits alone, in place, if it returns more in either mode; `notify` of that.

    Paths, state and the name of its class stay. Two black images are run, which leaves no trace. Raises ModelError if
    something that decides the logits in evaluation would stay untrained, such as DeiT's second head.
    """
    with torch.no_grad():
        outputs = {training: _trial(model, image_shape, training) for training in (False, True)}
    found = {training: output for training, output in outputs.items() if main_logits(output) is not output}
    if not found:
        return
    own = type(model)

    def forward(self: nn.Module, images: Tensor) -> Any:
        return main_logits(own.forward(self, images))

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (own,), {**names, "forward": forward, OWN_CLASS: own})
    if True in found and (untrained := _untrained(model, image_shape)):
        raise ModelError(
            f"{name} returns {_kind(found[True])} in training, and {untrained[0]} decides its logits in evaluation, "
            "but not the main ones in training (`logits`, or the first): let it return its logits alone in training, "
            "too."
        )
    when = "" if len(found) == 2 else " in training" if True in found else " in evaluation"
    notify(
        f"{name} returns {_kind(next(iter(found.values())))}{when}: its main logits are used (`logits`, or the first)."
    )


def require_repeatable(name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Check that the logits of an image are a function of the image alone in evaluation; it leaves no trace.

    Raises ModelError if they are random, or depend on the other images of the batch: each run would store others.
    """
    pixels = torch.rand(3, *image_shape, generator=torch.Generator().manual_seed(0))
    restore = snapshot(model, pixels)
    with preserve_modes(model), torch.no_grad():
        try:
            model.eval()
            first, again, beside = (model(pixels[rows])[0].clone() for rows in ([0, 1], [0, 1], [0, 2]))
        except Exception:  # the first real run reports it
            return
        finally:
            restore()
    if first.is_meta or not first.isfinite().all():
        return
    allowed = TOLERANCE * float(first.abs().max())
    if not torch.allclose(first, again, rtol=0, atol=allowed):
        raise ModelError(
            f"{name} gives an image other logits at each call in eval mode: let its random operations end there, as in "
            "nn.Dropout, or F.dropout(x, training=self.training)."
        )
    if not torch.allclose(first, beside, rtol=0, atol=allowed):
        raise ModelError(
            f"{name} gives an image other logits in eval mode beside other images of a batch: let eval() reach all of "
            "its layers, and its batch norms have track_running_stats=True."
        )


def _kind(output: Any) -> str:
    return type(output).__name__


def _trial(
    model: nn.Module, image_shape: tuple[int, int, int], training: bool, use: Callable[[Any], T] = lambda output: output
) -> T | None:
    """Return `use` of what the model returns for two black images in a mode; None if it fails. It leaves no trace."""
    images = torch.zeros(2, *image_shape)
    restore = snapshot(model, images)
    with preserve_modes(model):
        try:
            return use(model.train(training)(images))
        except Exception:  # the first real run reports it
            return None
        finally:
            restore()


def _untrained(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Return the trainable parameters that decide the logits in evaluation, but not in training."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def used_by(logits: Tensor) -> set[str]:
        gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
        return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    evaluated, trained = (_trial(model, image_shape, training, used_by) for training in (False, True))
    return [name for name in parameters if evaluated and trained and name in evaluated - trained]
