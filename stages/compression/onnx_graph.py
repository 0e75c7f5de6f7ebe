"""An ONNX file opened by onnxruntime's CPU, and what the graph that it really runs there still computes in float."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from stages.errors import ModelError, cause

INPUT, OUTPUT = "images", "logits"
QUIET = 3  # onnxruntime's log level for errors
PATH_END = "/"  # what stands between the module path and the exporter's own name in the name of a node

INTEGER_KERNELS = ("QLinear", "QGemm", "QuantizeLinear", "DequantizeLinear")
"""How the names begin of operators that compute on integers, or lead from float to them and back; scales are float."""

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"}
"""Operators that read no value: they give the same memory another shape, in float as in INT8."""

COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "ArgMax", "ArgMin"}
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


@dataclass(frozen=True)
class FloatNode:
    """An operation that runs in float.

    module: the path of the innermost module whose forward it is; "" where that is the network's own.
    behind: the path of the module that gives its first input, or "" if that is not known; it helps where `module` does
    not, for a function in the network's own forward.
    """

    name: str
    op_type: str
    module: str
    behind: str

    def __str__(self) -> str:
        """Such as "Sigmoid in block.gate", "Mul behind block.gate"."""
        if self.module:
            return f"{self.op_type} in {self.module}"
        return f"{self.op_type} behind {self.behind}" if self.behind else self.op_type


def session_options(num_threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of a session that says nothing but errors; `num_threads` 0 leaves the number to onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = num_threads
    return options


def open_session(
    path: Path, *, num_threads: int = 0, optimized_path: Path | None = None
) -> onnxruntime.InferenceSession:
    """onnxruntime's CPU session over an ONNX file; `num_threads` 0 leaves the number to it.

    With `optimized_path`, the graph that it really runs is written there. Raises ModelError if `path` is missing or
    is no ONNX network.
    """
    options = session_options(num_threads)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if not path.is_file():
        raise ModelError(f"there is no ONNX file at {path}.")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:
        raise ModelError(f"onnxruntime cannot load {path}: {cause(fault)}") from fault


def optimized_graph(path: Path) -> onnx.GraphProto:
    """The graph of an ONNX file as onnxruntime's CPU runs it, after its optimizations. ModelError as `open_session`."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized_path=optimized)
        return onnx.load(optimized).graph


def op_counts(path: Path) -> dict[str, int]:
    """How often each operator stands in the graph that onnxruntime's CPU runs after its optimizations, by name."""
    counts = Counter(node.op_type for node in optimized_graph(path).node)
    return dict(sorted(counts.items()))


def float_nodes(path: Path) -> list[FloatNode]:
    """The operations of an INT8 file that onnxruntime's CPU does not run on integers, in the order in which it runs
    them; none if it is fused throughout.

    The images' rounding, and the step from integers to float logits, are no such operations; nor are views. What moves
    float values in memory (transposing, joining) is one. ModelError as `open_session`.
    """
    graph = optimized_graph(path)
    origins = _Origins(onnx.load(path).graph, graph)
    floating = {each.name for each in graph.initializer if each.data_type in FLOATS}
    floating |= {each.name for each in graph.input if each.type.tensor_type.elem_type in FLOATS}
    found = []
    for node in graph.node:
        in_float = _gives_float(node, floating)
        if in_float:
            floating.update(node.output)
        if (in_float or floating & set(node.input)) and not _is_exempt(node):
            found.append(FloatNode(node.name, node.op_type, origins.module_of(node), origins.module_before(node)))
    return found


def module_path(node: onnx.NodeProto) -> str:
    """The path of the module of which a node of an exported file is part; "" for the network's own forward."""
    return node.name.rpartition(PATH_END)[0]


class _Origins:
    """The nodes of a file, found again from those that onnxruntime has made of them."""

    def __init__(self, graph: onnx.GraphProto, optimized: onnx.GraphProto) -> None:
        self._by_name = {node.name: node for node in graph.node if node.name}
        self._by_value = {value: node for node in graph.node for value in node.output}
        self._made_by_value = {value: node for node in optimized.node for value in node.output}

    def module_of(self, made: onnx.NodeProto) -> str:
        """The path of the module of which a node is part, or ""."""
        node = self._origin(made)
        return module_path(node) if node else ""

    def module_before(self, made: onnx.NodeProto) -> str:
        """The path of the nearest module that leads to the first input of a node, or ""."""
        node = self._origin(made)
        if node is None:  # one of those that make up an operator for which onnxruntime has no kernel
            above = self._above(made, self._made_by_value)
            return (self.module_of(above) or self.module_before(above)) if above else ""
        while node := self._above(node, self._by_value):
            if module_path(node):
                return module_path(node)
        return ""

    def _origin(self, made: onnx.NodeProto) -> onnx.NodeProto | None:
        """onnxruntime names a node after what it is made of, or after the value that it gives."""
        name = re.sub(r"_token_\d+$", "", made.name.removeprefix("fused ").removesuffix("_nchwc"))
        known = (self._by_value.get(value) for value in made.output)
        return self._by_name.get(name) or self._by_value.get(name) or next(filter(None, known), None)

    @staticmethod
    def _above(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
        return producers.get(node.input[0]) if node.input else None


def _is_exempt(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(INTEGER_KERNELS) or node.op_type in VIEWS


def _gives_float(node: onnx.NodeProto, floating: set[str]) -> bool:
    """Whether the first output of `node` is float, given the names of the float values before it.

    onnxruntime's own operators are unknown to onnx's type inference, so this goes by what they are.
    """
    op = node.op_type
    attributes = {each.name: each for each in node.attribute}
    if op == "Constant":
        return attributes["value"].t.data_type in FLOATS if "value" in attributes else "value_float" in attributes
    if op == "Cast":
        return attributes["to"].i in FLOATS
    if op == "QGemm":
        return len(node.input) < 9 or not node.input[8]  # without a zero point for its output, it gives float
    if op.startswith(("QLinear", "QuantizeLinear")) or op in COMPARISONS or op in {"Shape", "Size"}:
        return False
    return op == "DequantizeLinear" or bool(floating & set(node.input))
