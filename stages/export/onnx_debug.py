"""Find the first layer of an ONNX file whose output differs from its network's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, module_path, session_options
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import capture

if TYPE_CHECKING:
    import onnx

TOLERANCE = 0.05
"""An output diverges if the difference has more than this share of its norm; INT8's near-ties stay below."""


def first_divergence(path: Path, model: torch.nn.Module, images: Tensor) -> str:
    """Return a clause naming the first layer whose output in the file differs from that in `model`, and by how much.

    Compared are the layers with parameters, in the file's order, and the logits, in eval mode on the CPU, on a few
    dozen normalized `images` [B, C, H, W].
    """
    import onnx

    proto, images = onnx.load(path), images.cpu().float()
    reference = clone_without_hooks(model).cpu().eval()
    modules = {
        name: module for name, module in reference.named_modules() if next(module.parameters(False), None) is not None
    }
    nodes = [node for node in proto.graph.node if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}]
    last = {module_path(node): node for node in nodes if module_path(node) in modules}
    with torch.no_grad(), capture((modules[name] for name in last), _clone) as outputs:
        logits = reference(images)
    calls = {name: outputs[modules[name]] for name in last}
    called_once = [name for name, found in calls.items() if len(found) == 1 and isinstance(found[0], Tensor)]
    values = _run(proto, [last[name].output[0] for name in called_once], images)
    for name in called_once:
        error = _relative_error(values[last[name].output[0]], calls[name][0])
        if error > TOLERANCE:
            return f"the output of {_layer(proto, last[name], name)} differs by {error:.1%}"
    error = _relative_error(values[OUTPUT], logits)
    if error <= TOLERANCE:
        return f"no layer's output differs by more than {TOLERANCE:.0%} on {len(images)} images"
    return f"the logits differ by {error:.1%}"


def _clone(output: object) -> object:
    """Copy a tensor: later operations may work in place."""
    return output.clone() if isinstance(output, Tensor) else output


def _run(proto: onnx.ModelProto, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the logits and some intermediate values of a file, by name, from onnxruntime's CPU."""
    import onnx
    import onnxruntime

    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != OUTPUT)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {INPUT: images.numpy()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), found, strict=True)}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of `expected`; infinite for NaN, 0 for values of another shape."""
    if found.shape != expected.shape:  # the file's last operation there is another one
        return 0.0
    error = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return math.inf if math.isnan(error) else error


def _layer(proto: onnx.ModelProto, node: onnx.NodeProto, path: str) -> str:
    """Name the layer whose weight a node uses; that is another one where the exporter folded a batch norm."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    owner = next((name.rpartition(".")[0] for name in node.input if name in weights and "." in name), path)
    return f"{owner or path} ({node.op_type})"
