"""Reading what a module inside a network gives, by its path, without touching the network's code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stages.errors import ModelError
from stages.forms import Wanted, widened
from stages.models.module_path import module_named


@dataclass(frozen=True)
class Outputs:
    """What a network gave for a batch: logits [B, num_classes], and its modules' outputs [B, ...] by path."""

    logits: Tensor
    features: Mapping[str, Tensor]

    def rows(self, index: Tensor) -> Outputs:
        """The same for some of the samples, int64 [n]."""
        return Outputs(self.logits[index], rows_of(self.features, index))

    def widened(self) -> Outputs:
        """The same in float32 or wider."""
        return Outputs(widened(self.logits), {layer: widened(feature) for layer, feature in self.features.items()})


class TeacherOutputs(Protocol):
    """What a teacher said about a batch, live or from a store."""

    @property
    def features(self) -> Mapping[Wanted, Tensor]:
        """What a loss wanted of the teacher's layers, [B, ...]."""

    def logits_at(self, temperature: float) -> Tensor:
        """Logits [B, num_classes], float32, that are right in a softmax at `temperature`."""

    def rows(self, index: Tensor) -> TeacherOutputs:
        """The same for some of the samples, int64 [n]."""


@dataclass(frozen=True)
class DenseOutputs:
    """What a teacher said whose logits, [B, num_classes], are all known: the same at any temperature."""

    logits: Tensor
    features: Mapping[Wanted, Tensor]

    def logits_at(self, temperature: float) -> Tensor:
        return self.logits

    def rows(self, index: Tensor) -> DenseOutputs:
        return DenseOutputs(self.logits[index], rows_of(self.features, index))


K = TypeVar("K")


def rows_of(features: Mapping[K, Tensor], index: Tensor) -> dict[K, Tensor]:
    """Some rows, int64 [n], of each of the features."""
    return {key: feature[index] for key, feature in features.items()}


class _Enough(Exception):
    """Everything wanted has been caught."""


class Tap:
    """A network together with the modules whose outputs are wanted; calling it runs both. Made by `tapped`.

    no_further: nothing runs behind the last of the modules, and the logits have no classes, [B, 0].
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], *, no_further: bool = False) -> None:
        self._model = model
        self._no_further = no_further
        self._layers = tuple(dict.fromkeys(layers))
        self._caught: dict[str, Tensor] = {}
        self._hooks = [module_named(model, layer).register_forward_hook(self._catcher(layer)) for layer in self._layers]

    def __call__(self, images: Tensor) -> Outputs:
        self._caught = {}
        try:
            logits = self._model(images)
        except _Enough:
            logits = images.new_empty(len(images), 0)
        absent = [layer for layer in self._layers if layer not in self._caught]
        if absent:
            raise ModelError(f"module {absent[0]!r} took no part in the forward pass: name another layer.")
        return Outputs(logits, self._caught)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _catcher(self, layer: str) -> Any:
        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ModelError(f"module {layer!r} gives {type(output).__name__}, not a tensor: name another layer.")
            self._caught[layer] = output
            if self._no_further and len(self._caught) == len(self._layers):
                raise _Enough

        return catch


@contextmanager
def tapped(model: nn.Module, layers: Iterable[str], *, no_further: bool = False) -> Iterator[Tap]:
    """Hook `layers` of `model` while the block runs. A wrong path is a ModelError that lists the nearest ones."""
    tap = Tap(model, layers, no_further=no_further)
    try:
        yield tap
    finally:
        tap.close()


def feature_shapes(model: nn.Module, layers: Iterable[str], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The shape of one sample's output, without the batch axis, at each of `layers`, for images (C, H, W)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), tapped(model, layers) as tap:
        outputs = tap(torch.zeros(2, *image_shape, device=device))
    model.train(was_training)
    return {layer: tuple(feature.shape[1:]) for layer, feature in outputs.features.items()}
