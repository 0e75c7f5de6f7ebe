"""Find the first operation of an ONNX file whose values differ from its network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from kdpipe.stages.export.exportable import Diagnosable
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, module_path, session_options
from kdpipe.stages.models.clone import clone_without_hooks

FLOAT_TOLERANCE = 1e-3
"""Float values diverge if they differ by more than this share of the largest magnitude of their tensor."""

NOWHERE = "nowhere on these images"


@dataclass(frozen=True)
class Divergence:
    """A place in an ONNX file, and how far its values are from torch's.

    Attributes:
        place: The operation.
        share: The share of the values beyond the tolerance.
        largest: The largest difference, in `unit`.
        num_one_off: How many INT8 values are one quantization step off.
    """

    place: str
    share: float
    largest: float
    unit: str
    num_one_off: int = 0

    def __str__(self) -> str:
        return f"at {self.place} {100 * self.share:.3g} % of the values differ, by up to {self.largest:.4g} {self.unit}"


def first_divergence(path: Path, model: nn.Module, images: Tensor) -> str:
    """Return a clause naming the first place where a file and its network diverge, for what share, and how far.

    The network runs in eval mode on the CPU, on normalized `images` [B, C, H, W] (a few dozen). Float values diverge if
    they differ by 0.001 of the largest one. A `Diagnosable` model compares its values itself.
    """
    images = images.cpu().float()
    reference = clone_without_hooks(model).cpu().eval()
    proto = onnx.load(path)
    if isinstance(reference, Diagnosable):
        return reference.first_divergence(proto, images)
    first = next((found for found in float_divergences(proto, reference, images) if found.share), None)
    return str(first) if first else NOWHERE


def float_divergences(proto: onnx.ModelProto, model: nn.Module, images: Tensor) -> list[Divergence]:
    """Compare the output of every module without children, and the logits, in the file's order."""
    last = {module_path(node): node for node in proto.graph.node if module_path(node)}
    modules = dict(model.named_modules())
    paths = [path for path in last if path in modules and not list(modules[path].children())]
    outputs = capture_outputs(model, paths, images)
    captured = [path for path in paths if path in outputs]
    values = {path: last[path].output[0] for path in captured if last[path].output[0] != OUTPUT}
    found = run_onnx(with_outputs(proto, list(values.values()), onnx.TensorProto.FLOAT), {INPUT: images})
    divergences = [
        compare_floats(_layer(proto, last[path], path), found[value], outputs[path])
        for path, value in values.items()
        if found[value].shape == outputs[path].shape
    ]
    return [*divergences, compare_floats("the logits", found[OUTPUT], outputs[""])]


def compare_floats(place: str, found: Tensor, expected: Tensor) -> Divergence:
    """Compare float values relative to the largest expected magnitude."""
    largest = float(expected.abs().max()) or 1.0
    difference = (found - expected).abs() / largest
    beyond = ~(difference <= FLOAT_TOLERANCE)  # NaN diverges too
    return Divergence(place, float(beyond.double().mean()), float(difference.max()), "of the largest one")


def with_outputs(proto: onnx.ModelProto, names: Sequence[str], kind: int) -> onnx.ModelProto:
    """Return a copy of an ONNX model with additional outputs of one element type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    return copy


def run_onnx(proto: onnx.ModelProto, feeds: Mapping[str, Tensor], *, optimized: bool = True) -> dict[str, Tensor]:
    """Return every output of an ONNX model by name, from onnxruntime's CPU."""
    options = session_options()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in proto.graph.output]
    found = session.run(names, {name: value.numpy() for name, value in feeds.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def capture_outputs(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the modules that are called once and return one tensor, by path; "" is the logits."""
    calls: dict[str, list[Any]] = {path: [] for path in paths}
    hooks = [model.get_submodule(path).register_forward_hook(_recorder(calls[path])) for path in paths]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = {path: outputs[0] for path, outputs in calls.items() if len(outputs) == 1}
    return {path: output for path, output in once.items() if isinstance(output, Tensor)} | {"": logits}


def _recorder(outputs: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output.clone() if isinstance(output, Tensor) else output)  # later operations may work in place

    return record


def _layer(proto: onnx.ModelProto, node: onnx.NodeProto, path: str) -> str:
    """Name the layer whose weight a node uses; that is another one where the exporter folded a batch norm."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    owner = next((name.rpartition(".")[0] for name in node.input if name in weights and "." in name), path)
    return f"{owner or path} ({node.op_type})"
