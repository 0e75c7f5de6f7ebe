"""Open ONNX files in onnxruntime's CPU and find what its optimized graph still computes in float."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.stages.errors import ModelError, cause

if TYPE_CHECKING:
    import onnx
    import onnxruntime

INPUT, OUTPUT = "images", "logits"
ERRORS_ONLY = 3
"""onnxruntime's log level."""

PATH_END = "/"
"""The separator between the module path and the exporter's name in a node's name."""

INTEGER_KERNELS = ("QLinear", "QGemm", "QuantizeLinear", "DequantizeLinear")
"""Name prefixes of operators that compute on integers, or convert from float and back; scales are float."""

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"}
"""Operators that only reshape memory, in float as in INT8."""

COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "ArgMax", "ArgMin"}
FLOATS = {1, 10, 11, 16}  # FLOAT, FLOAT16, DOUBLE and BFLOAT16 of onnx.TensorProto


@dataclass(frozen=True)
class FloatNode:
    """An operation that runs in float, and the innermost module whose forward it belongs to; "" if unknown."""

    op_type: str
    module: str

    def __str__(self) -> str:
        """Format as "Sigmoid in block.gate"."""
        return f"{self.op_type} in {self.module}" if self.module else self.op_type


def session_options(num_threads: int = 0) -> onnxruntime.SessionOptions:
    """Return options of a session that only logs errors; `num_threads` 0 leaves the number to onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = num_threads
    return options


def open_session(path: Path, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """Open a CPU session for an ONNX file. Raises ModelError if `path` is missing or not an ONNX network."""
    import onnxruntime

    options = options or session_options()
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not an ONNX file.")
    if not path.is_file():
        raise ModelError(f"there is no ONNX file at {path}.")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"onnxruntime cannot load {path}: {cause(error)}") from error


def optimized_graph(path: Path) -> onnx.GraphProto:
    """Return the graph that onnxruntime's CPU runs after its optimizations. Raises ModelError as `open_session`."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = session_options()
        options.optimized_model_filepath = str(optimized)
        open_session(path, options)
        return onnx.load(optimized).graph


def op_counts(path: Path) -> dict[str, int]:
    """Count each operator in the graph that onnxruntime's CPU runs after its optimizations, by name."""
    counts = Counter(node.op_type for node in optimized_graph(path).node)
    return dict(sorted(counts.items()))


def float_nodes(path: Path) -> list[FloatNode]:
    """List the operations of an INT8 file that onnxruntime's CPU does not run on integers, in execution order.

    The images' rounding, the final step from integers to float logits, and views do not count. Moving float values in
    memory (transposing, joining) does. Raises ModelError as `open_session`.
    """
    import onnx

    graph = optimized_graph(path)
    originals = {key: node for node in onnx.load(path).graph.node for key in (node.name, *node.output)}
    floating = {tensor.name for tensor in graph.initializer if tensor.data_type in FLOATS}
    floating |= {value.name for value in graph.input if value.type.tensor_type.elem_type in FLOATS}
    found = []
    for node in graph.node:
        in_float = _returns_float(node, floating)
        if in_float:
            floating.update(node.output)
        is_integer = node.op_type.startswith(INTEGER_KERNELS)
        if (in_float or floating & set(node.input)) and not is_integer and node.op_type not in VIEWS:
            # onnxruntime names a node after its origin, or after its output.
            name = re.sub(r"_token_\d+$", "", node.name.removeprefix("fused ").removesuffix("_nchwc"))
            origin = next((originals[key] for key in (name, *node.output) if key and key in originals), None)
            found.append(FloatNode(node.op_type, module_path(origin) if origin else ""))
    return found


def module_path(node: onnx.NodeProto) -> str:
    """Return the path of the module that a node of an exported file belongs to; "" for the network's own forward."""
    return node.name.rpartition(PATH_END)[0]


def _returns_float(node: onnx.NodeProto, floating: set[str]) -> bool:
    """Return whether the first output of `node` is float, given the names of the float values before it.

    onnx's type inference does not know onnxruntime's own operators, so this goes by their names.
    """
    op = node.op_type
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if op == "Constant":
        return attributes["value"].t.data_type in FLOATS if "value" in attributes else "value_float" in attributes
    if op == "Cast":
        return attributes["to"].i in FLOATS
    if op == "QGemm":
        return len(node.input) < 9 or not node.input[8]  # without a zero point for its output, it returns float
    if op.startswith(("QLinear", "QuantizeLinear")) or op in COMPARISONS or op in {"Shape", "Size"}:
        return False
    return op == "DequantizeLinear" or bool(floating & set(node.input))
