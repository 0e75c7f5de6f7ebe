"""Modules by their dotted path (`layer3`, `blocks.5`), and forward hooks that capture their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.numerics import to_float32
from kdpipe.store.errors import did_you_mean


@dataclass(frozen=True)
class ModelOutput:
    """Outputs of a network for a batch: logits [B, num_classes], and features [B, ...] by module path."""

    logits: Tensor
    features: Mapping[str, Tensor]

    def rows(self, index: Tensor) -> ModelOutput:
        """Return the outputs for some of the samples, index int64 [n]."""
        return ModelOutput(self.logits[index], rows_of(self.features, index))

    def to_float32(self) -> ModelOutput:
        """Return the same in float32 or wider."""
        return ModelOutput(
            to_float32(self.logits), {layer: to_float32(feature) for layer, feature in self.features.items()}
        )


K = TypeVar("K")


class _AllCaptured(Exception):
    """All layers have been captured."""


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule of `model` at `path`; raises ModelError, with the nearest paths, if there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    del modules[""]  # the model itself: its output is the logits, which need no hook
    if path in modules:
        return modules[path]
    children = ", ".join(name for name, _ in model.named_children())
    hint = did_you_mean(path, modules, limit=3, otherwise=f"it has: {children}.")
    raise ModelError(f"the model has no module {path!r}; {hint}")


def rows_of(features: Mapping[K, Tensor], index: Tensor) -> dict[K, Tensor]:
    """Return some rows, index int64 [n], of each feature."""
    return {key: feature[index] for key, feature in features.items()}


@contextmanager
def capture(
    modules: Iterable[nn.Module], keep: Callable[[Any], Any] = lambda output: output
) -> Iterator[dict[nn.Module, list[Any]]]:
    """Record `keep` of the modules' outputs, call by call, while the block runs."""
    outputs: dict[nn.Module, list[Any]] = {module: [] for module in modules}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[module].append(keep(output))

    with ExitStack() as hooks:
        for module in outputs:
            hooks.enter_context(module.register_forward_hook(hook))
        yield outputs


@contextmanager
def model_errors(images: Tensor) -> Iterator[None]:
    """Convert errors of a model run on `images` to a ModelError."""
    try:
        yield
    except Exception as error:
        shape = list(images.shape)
        raise ModelError(f"the model does not run on an input of shape {shape}: {cause(error)}") from error


class FeatureExtractor:
    """A network that also returns the outputs of its hooked modules. Use `extract_features` to create it."""

    def __init__(self, model: nn.Module, layers: Sequence[str], no_further: bool) -> None:
        self._model, self._layers, self._no_further = model, layers, no_further
        self._captured: dict[str, Tensor] | None = None  # outside of a call the model runs as without hooks

    def __call__(self, images: Tensor) -> ModelOutput:
        self._captured = captured = dict[str, Tensor]()
        try:
            logits = self._model(images)
        except _AllCaptured:
            logits = images.new_empty(len(images), 0)
        finally:
            self._captured = None
        absent = [layer for layer in self._layers if layer not in captured]
        if absent:
            raise ModelError(f"module {absent[0]!r} is not used in the forward pass: choose another layer.")
        return ModelOutput(logits, captured)

    def hook(self, layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Capture the output of a layer."""
        if self._captured is None:
            return
        if not isinstance(output, Tensor):
            raise ModelError(f"module {layer!r} outputs {type(output).__name__}, not a tensor: choose another layer.")
        self._captured[layer] = output
        if self._no_further and len(self._captured) == len(self._layers):
            raise _AllCaptured


@contextmanager
def extract_features(
    model: nn.Module, layers: Iterable[str], *, no_further: bool = False
) -> Iterator[FeatureExtractor]:
    """Hook `layers` of `model` while the block runs; raises ModelError, with the nearest paths, if one does not exist.

    With `no_further` the forward pass stops after the last of them; the logits are then [B, 0].
    """
    layers = tuple(dict.fromkeys(layers))
    extractor = FeatureExtractor(model, layers, no_further)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(get_module(model, layer).register_forward_hook(partial(extractor.hook, layer)))
        yield extractor


def feature_shapes(model: nn.Module, layers: Iterable[str], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the shape of each layer's output, without the batch axis, for images (C, H, W)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), extract_features(model, layers) as extractor:
        outputs = extractor(torch.zeros(2, *image_shape, device=device))
    model.train(was_training)
    return {layer: tuple(feature.shape[1:]) for layer, feature in outputs.features.items()}
