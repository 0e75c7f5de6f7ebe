"""Check that an ONNX file keeps to what TensorRT's parser takes; TensorRT itself is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from kdpipe.stages.errors import ModelError

ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")
MAX_NAMED = 3
"""The number of violations that an error names."""


def require_tensorrt(path: Path) -> None:
    """Raise ModelError, naming the first violations, unless TensorRT's parser takes the ONNX file at `path`."""
    found = list(tensorrt_violations(onnx.load(path)))
    if found:
        more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise ModelError(
            f"TensorRT would not take {path}: {'; '.join(found[:MAX_NAMED])}{more}. Compress the student again with "
            'compress.target = "tensorrt".'
        )


def tensorrt_violations(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield in words where a network breaks the rules of TensorRT's explicit quantization.

    INT8 is signed with zero points of 0; integers of 32 bits are not dequantized; scales are positive constants; only
    weights have a scale per channel, one for each output channel; what is added up before a rounding is rounded on both
    sides; there are no operators of onnxruntime's own.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.domain:
            yield f"{node.op_type} ({node.name}) is an operator of {node.domain}"
        elif node.op_type in ROUNDINGS:
            yield from (f"{node.op_type} ({node.name}) {fault}" for fault in _faults_of_rounding(node, constants))
    yield from _sums_rounded_on_one_side(graph, set(constants))


def _faults_of_rounding(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> Iterator[str]:
    scale, zero = (constants.get(name) for name in (*node.input[1:], "", "")[:2])
    data = constants.get(node.input[0])
    if zero is None or zero.data_type != TensorProto.INT8:
        found = "is missing" if zero is None else f"has the type {TensorProto.DataType.Name(zero.data_type)}"
        yield f"is not signed 8-bit: its zero point {found}"
    elif np.any(numpy_helper.to_array(zero)):
        yield "has a zero point other than 0"
    if scale is None or not np.all(numpy_helper.to_array(scale) > 0):
        yield "has a scale that is no positive constant"
    elif (num_scales := int(np.prod(scale.dims))) > 1:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if data is None:
            yield "has a scale per channel on an activation"
        elif axis != 0 or data.dims[0] != num_scales:
            yield f"has {num_scales} scales along axis {axis} of a weight {list(data.dims)}, not one per output channel"


def _sums_rounded_on_one_side(graph: onnx.GraphProto, constants: set[str]) -> Iterator[str]:
    producers = {value: node for node in graph.node for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    for node in graph.node:
        if node.op_type != "Add" or constants & set(node.input):
            continue
        after = readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
            after = readers.get(after[0].output[0], [])
        sides = [value in producers and producers[value].op_type == "DequantizeLinear" for value in node.input]
        if any(reader.op_type == "QuantizeLinear" for reader in after) and not all(sides):
            yield f"Add ({node.name}) is rounded, but not on both sides of the sum"
