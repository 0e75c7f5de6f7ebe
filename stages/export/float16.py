"""FP16 for GPUs: an ONNX file with float16 weights and activations, and whether its values fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.exportable import quiet
from kdpipe.stages.export.onnx_session import FLOATS, INPUT, module_path, session_options
from kdpipe.store.fs.checksums import write_with_sum

if TYPE_CHECKING:
    import onnx

MAX_FLOAT16 = 65504.0
"""The largest number of float16."""


def export_float16(onnx_path: Path, path: Path) -> None:
    """Write the FP16 form of a float32 ONNX file, byte-identical each time.

    Weights and activations are float16; the images and the logits stay float32, cast within the file, so that a caller
    needs no change. The batch axis stays free. Operators without a float16 form stay float32. Zeros stay zero.

    Raises:
        ModelError: If it cannot be converted or written.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = onnx.load(onnx_path)
    try:
        with quiet():
            half = ONNXModel(convert_float_to_float16(proto, keep_io_types=True))
            half.topological_sort()
            onnx.checker.check_model(half.model, full_check=True)
    except Exception as error:  # neither library has a base class of errors
        raise ModelError(f"{onnx_path} cannot be written in float16: {cause(error)}") from error
    try:
        write_with_sum(path, half.model.SerializeToString(deterministic=True))
    except OSError as error:
        raise ModelError(f"the ONNX file {path} cannot be written: {error.strerror or cause(error)}.") from error


@dataclass(frozen=True)
class LargestValue:
    """The largest magnitude among a network's weights and activations, and where it is: "Conv in layer1.0"."""

    value: float
    where: str

    @property
    def fits(self) -> bool:
        """Whether float16 holds it."""
        return self.value <= MAX_FLOAT16


def largest_value(onnx_path: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> LargestValue:
    """Find the first value of a float32 ONNX file that float16 does not hold, or else its largest value.

    onnxruntime's CPU computes much of an FP16 file in float32: what would overflow on a GPU does not show there.

    Args:
        onnx_path: The file.
        batches: Normalized images [B, C, H, W], with labels that do not count.

    Raises:
        ModelError: If onnxruntime does not run it.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(onnx_path)
    largest = [
        LargestValue(float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0)), f"the weights {tensor.name}")
        for tensor in proto.graph.initializer
        if tensor.data_type in FLOATS
    ]
    measured = _with_magnitudes(proto)
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        values = [0.0] * len(measured)
        for images, _ in batches:
            found = session.run(list(measured), {INPUT: images.cpu().float().numpy()})
            values = [max(old, float(np.nan_to_num(new, nan=math.inf))) for old, new in zip(values, found, strict=True)]
    except Exception as error:
        raise ModelError(f"the values in {onnx_path} cannot be measured: {cause(error)}") from error
    largest += [LargestValue(value, where) for value, where in zip(values, measured.values(), strict=True)]
    outside = next((one for one in largest if not one.fits), None)
    return outside or max(largest, key=lambda one: one.value)


def _with_magnitudes(proto: onnx.ModelProto) -> dict[str, str]:
    """Add the largest magnitude of each float value to the outputs; return their names, and where each comes from."""
    from onnx import TensorProto, helper, shape_inference

    graph = proto.graph
    known = {value.name: value.type for value in shape_inference.infer_shapes(proto).graph.value_info}
    known |= {value.name: value.type for value in graph.output}
    measured: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type in ("Constant", "ConstantOfShape"):
            continue
        for value in node.output:
            if value not in known or known[value].tensor_type.elem_type != TensorProto.FLOAT:
                continue
            magnitude, name = f"{value}_magnitude", f"{value}_largest"
            graph.node.append(helper.make_node("Abs", [value], [magnitude]))
            graph.node.append(helper.make_node("ReduceMax", [magnitude], [name], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
            measured[name] = f"{node.op_type} in {module_path(node)}" if module_path(node) else node.op_type
    return measured
