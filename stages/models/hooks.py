"""Modules by their dotted path (`layer3`, `blocks.5`), and hooks that capture their outputs, or parts of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.compute.compiled import begin_step, compiled
from kdpipe.stages.compute.folding import FoldedBatchNorms
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.tokens import PRE_LOGITS, hooked, split_form, token_part
from kdpipe.stages.numerics import to_float32
from kdpipe.store.errors import did_you_mean


@dataclass(frozen=True)
class ModelOutput:
    """Outputs of a network for a batch: logits [B, num_classes], and features [B, ...] by module path."""

    logits: Tensor
    features: Mapping[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.logits, *self.features.values()]

    def rows(self, index: Tensor) -> ModelOutput:
        """Return the outputs for some of the samples, index int64 [n]."""
        return ModelOutput(self.logits[index], rows_of(self.features, index))

    def to_float32(self) -> ModelOutput:
        """Return the same in float32 or wider."""
        return ModelOutput(
            to_float32(self.logits), {layer: to_float32(feature) for layer, feature in self.features.items()}
        )


K = TypeVar("K")
T = TypeVar("T")


IMAGES = ""
"""The input, beside the paths of modules."""

MEMBERS = "members"
"""The path of the members in networks of several, whose layers are named as in each: `members.0.layer3`."""


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


def nearest(operation: Any, values: Mapping[Any, T]) -> list[T]:
    """Return the `values` of the first autograd operations that have one, on the way back from `operation`."""
    pending, found, visited = [operation], list[T](), set[Any]()
    while pending:
        node = pending.pop()
        if node in values:
            found.append(values[node])
        elif node is not None and node not in visited:
            visited.add(node)
            pending += [previous for previous, _ in node.next_functions]
    return found


@contextmanager
def model_errors(images: Tensor) -> Iterator[None]:
    """Convert errors of a model run on `images` to a ModelError."""
    try:
        yield
    except Exception as error:
        shape = list(images.shape)
        raise ModelError(f"the model does not run on an input of shape {shape}: {cause(error)}") from error


class FeatureExtractor:
    """A network that also returns the outputs of its hooked modules. Use `extract_features` to create it.

    A feature is what the module returned, in its last call if the forward pass calls it several times. Where a later
    operation overwrites it in place, as `nn.ReLU(inplace=True)` and `x += shortcut` do, a copy is kept: the first call
    in each mode finds these layers, and starts again from the same buffers and random numbers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], no_further: bool, compile_key: str | None) -> None:
        self._model, self.layers, self._no_further = model, layers, no_further
        self._compile_key = compile_key
        self._compiled: Callable[[Tensor], tuple[Tensor, list[Tensor]]] | None = None
        self._joined: Callable[..., Any] | None = None  # the pass and a function of its outputs
        self.joins = compile_key is not None  # whether both may be compiled as one
        self._folded: FoldedBatchNorms | None = None
        self._captured: dict[str, Tensor] | None = None  # in a call that is compiled
        self._record: _Record | None = None  # outside of a call the model runs as without hooks
        self._num_calls: dict[bool, Counter[str]] = {}  # of each layer in a forward pass, by training mode
        self.overwritten: set[str] = set()

    def __call__(self, images: Tensor) -> ModelOutput:
        if self._compile_key is not None:
            return self._run_compiled(images, self._compile_key)
        return self.eager(images)

    def eager(self, images: Tensor) -> ModelOutput:
        """Run the network without torch.compile."""
        training = self._model.training
        if training in self._num_calls:
            record = self._run(images)
            overwritten = record.overwritten()
        else:
            restore = snapshot(self._model, images)
            record = self._run(images)
            self._num_calls[training] = record.num_calls
            if (overwritten := record.overwritten()) or self._no_further:
                del record  # frees its graph
                restore()
                self.overwritten |= overwritten
                record = self._run(images)
                overwritten = record.overwritten()
        if overwritten:
            raise ModelError(
                f"the forward pass overwrites {_named(overwritten)} in place in some calls only: choose another layer, "
                "or replace that operation by one that is not in place."
            )
        if absent := [layer for layer in self.layers if layer not in record.features]:
            raise ModelError(f"module {absent[0]!r} is not used in the forward pass: choose another layer.")
        return ModelOutput(record.logits, record.features)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile compiles the pass."""
        return self._compile_key is not None

    def stop_compiling(self) -> None:
        """Run without torch.compile from now on; frees CUDA's graphs with their memory, once nothing else has them."""
        self._compile_key = self._compiled = self._joined = None
        self.joins = False

    def joined(self, function: Callable[..., T], images: Tensor, *arguments: Any) -> T:
        """Return a function of the outputs and of more, the same in every call, compiled with the network as one graph.

        Raises RecipeError if they cannot be compiled together. Only while `joins` is true.
        """
        assert self._compile_key is not None

        def run(images: Tensor, *arguments: Any) -> T:
            logits, features = self._outputs(images)
            return function(ModelOutput(logits, dict(zip(self.layers, features, strict=True))), *arguments)

        self._find_overwritten(images)
        if self._joined is None:
            self._joined = compiled(run, images.device, key=self._compile_key)
        begin_step(images.device)
        return self._joined(images, *arguments)  # type: ignore[no-any-return]

    def folded(self, images: Tensor) -> FoldedBatchNorms:
        """Return what computes the network, in evaluation and with the weights of the first call, with folded norms."""
        if self._folded is None:
            self._find_overwritten(images[:2])
            self._folded = FoldedBatchNorms(lambda: self.eager(images[:2].clone()).tensors)
        return self._folded

    def _run(self, images: Tensor) -> _Record:
        given = images.clone() if IMAGES in self.overwritten else images
        self._record = record = _Record(images.new_empty(len(images), 0), {IMAGES: (images, _version(images))})
        try:
            record.logits = self._model(given)
        except _AllCaptured:
            pass
        finally:
            self._record = None
        return record

    def _find_overwritten(self, images: Tensor) -> None:
        """Run the network once in its mode, to find what is overwritten, and leave no trace."""
        if self._model.training not in self._num_calls:
            restore, grad = snapshot(self._model, images), torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(grad):  # inference tensors count no versions
                self.eager(images.clone())
            restore()

    def _run_compiled(self, images: Tensor, key: str) -> ModelOutput:
        self._find_overwritten(images)
        if self._compiled is None:
            self._compiled = compiled(self._outputs, images.device, key=key)
        begin_step(images.device)
        logits, features = self._compiled(images)
        if images.is_cuda and not self._model.training:  # the next batch may be computed before these are read
            logits, features = logits.clone(), [feature.clone() for feature in features]
        return ModelOutput(logits, dict(zip(self.layers, features, strict=True)))

    def _outputs(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and features; torch.compile can trace this."""
        captured: dict[str, Tensor] = {}
        self._captured = captured
        try:
            logits = self._model(images.clone() if IMAGES in self.overwritten else images)
        finally:
            self._captured = None
        return logits, [captured[layer] for layer in self.layers]

    def hook(self, layer: str, part: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        """Capture `part` of the output of a layer."""
        if self._captured is not None:
            self._captured[layer] = part(output.clone() if layer in self.overwritten else output)
            return
        record = self._record
        if record is None:
            return
        if not isinstance(output, Tensor):
            raise ModelError(f"module {layer!r} outputs {type(output).__name__}, not a tensor: choose another layer.")
        if layer in self.overwritten or output.is_inference():  # inference tensors count no versions
            output = output.clone()
        record.add(layer, part(output))
        if self._no_further and record.num_calls == self._num_calls.get(self._model.training):
            raise _AllCaptured


@dataclass
class _Record:
    """What a forward pass gives: logits, and each layer's output with its version counter at that time."""

    logits: Tensor
    outputs: dict[str, tuple[Tensor, int]]
    num_calls: Counter[str] = field(default_factory=Counter)

    def add(self, layer: str, output: Tensor) -> None:
        self.outputs[layer] = output, _version(output)
        self.num_calls[layer] += 1

    @property
    def features(self) -> dict[str, Tensor]:
        return {layer: output for layer, (output, _) in self.outputs.items() if layer != IMAGES}

    def overwritten(self) -> set[str]:
        """Return the layers whose outputs were changed in place since, IMAGES among them if the input was."""
        return {layer for layer, (output, version) in self.outputs.items() if _version(output) != version}


def _version(tensor: Tensor) -> int:
    """Return how often a tensor and the views of it were changed in place; -1 if torch does not count that."""
    return -1 if tensor.is_inference() else tensor._version


def _named(layers: Iterable[str]) -> str:
    return ", ".join(f"the output of {layer!r}" if layer else "the input" for layer in sorted(layers))


def snapshot(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a function that restores the model's buffers, the images and the random generators as they are now."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = [(tensor, tensor.detach().clone()) for tensor in (images, *(buffer for _, _, buffer in buffers))]
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(images.device) if images.is_cuda else None

    def restore() -> None:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, copy in copies:
                if not torch.equal(tensor, copy):
                    tensor.resize_(copy.shape).copy_(copy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, images.device)

    return restore


@contextmanager
def extract_features(
    model: nn.Module, layers: Iterable[str], *, no_further: bool = False, compile_key: str | None = None
) -> Iterator[FeatureExtractor]:
    """Hook `layers` of `model` while the block runs; raises ModelError, with the nearest paths, if one does not exist.

    With `no_further` the forward pass stops after the last of them, and is not compiled; the logits are then [B, 0].
    With `compile_key`, the recipe key that asks for it, torch.compile compiles the pass. On CUDA its outputs in
    training mode are valid until the next call.
    """
    layers = tuple(dict.fromkeys(layers))
    extractor = FeatureExtractor(model, layers, no_further, None if no_further else compile_key)
    with ExitStack() as hooks:
        for layer in layers:
            owner, own = _owner_of(model, layer)
            path, form = split_form(owner, own)
            named = get_module(owner, path) if path or own != PRE_LOGITS else owner
            module = hooks.enter_context(hooked(named, own, form))
            hook = partial(extractor.hook, layer, token_part(owner, own, form))
            hook = partial(_hook_input, hook) if form == PRE_LOGITS else hook
            hooks.enter_context(module.register_forward_hook(hook))
        hooks.callback(extractor.stop_compiling)
        yield extractor


def _owner_of(model: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """Return the network that a layer belongs to, and the layer's name there: a member of an ensemble, or the model."""
    members, number, own = [*layer.split(".", 2), "", ""][:3]
    found = getattr(model, members, None) if members == MEMBERS and number.isdigit() and own else None
    return (
        (found[int(number)], own) if isinstance(found, nn.ModuleList) and int(number) < len(found) else (model, layer)
    )


def _hook_input(hook: Callable[..., None], module: nn.Module, inputs: Any, output: Any) -> None:
    """Call a forward hook with a module's input in place of its output."""
    hook(module, inputs, inputs[0])


def feature_shapes(model: nn.Module, layers: Iterable[str], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the shape of each layer's output, without the batch axis, for images (C, H, W)."""
    outputs, _ = _trial(model, layers, image_shape)
    return {layer: tuple(feature.shape[1:]) for layer, feature in outputs.features.items()}


def overwritten_layers(model: nn.Module, layers: Iterable[str], image_shape: tuple[int, int, int]) -> set[str]:
    """Return those of `layers` whose output a later operation overwrites in place, in eval mode."""
    return _trial(model, layers, image_shape)[1]


def _trial(model: nn.Module, layers: Iterable[str], image_shape: tuple[int, int, int]) -> tuple[ModelOutput, set[str]]:
    """Run two black images in eval mode; return the outputs and the layers that are overwritten."""
    layers, device = tuple(layers), next(model.parameters()).device
    path, form = split_form(model, PRE_LOGITS) if PRE_LOGITS in layers else ("", None)
    traced = isinstance(model, fx.GraphModule)  # for quantization: what follows its layers may round
    classifier = [get_module(model, path)] if form and not traced else []
    with (
        preserve_modes(model),
        torch.no_grad(),
        extract_features(model, layers) as extractor,
        capture(classifier) as outputs,
    ):
        model.eval()
        found = extractor(torch.zeros(2, *image_shape, device=device))
    if classifier and not _same_values(outputs[classifier[0]][-1], found.logits):
        raise ModelError(
            f"{PRE_LOGITS!r} is the input of the last linear layer or convolution, {path!r}, but what that returns is "
            "not what the network returns: name the module whose output to use."
        )
    return found, extractor.overwritten - {IMAGES}


def _same_values(output: Tensor, logits: Tensor) -> bool:
    return output.numel() == logits.numel() and torch.equal(output.flatten(1), logits)
