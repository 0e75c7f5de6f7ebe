"""ONNX opsets: torch's exporter writes recent ones, onnx converts to older ones."""

from __future__ import annotations

import contextlib

import onnx
import onnxruntime
from onnx import version_converter

from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, session_options

EXPORTED_OPSET = 18
"""The oldest opset that torch's exporter writes; older ones are converted from it where possible."""


def downgrade_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a model to an opset older than the exporter's.

    The exporter would try this too, but silently keeps its own opset if it fails.

    Raises:
        ModelError: If the operators need a newer opset; the message names the oldest that works.
    """
    for candidate in range(max(opset, 1), EXPORTED_OPSET):
        with contextlib.suppress(Exception):  # the converter's errors have no base class of their own
            converted = version_converter.convert_version(proto, candidate)
            if _runs(converted):
                if candidate == opset:
                    return converted
                break
    else:
        candidate = EXPORTED_OPSET
    raise ModelError(
        f"the model cannot be written with ONNX opset {opset} (compress.opset): the oldest that has its operators is "
        f"{candidate}."
    )


def require_known_opset(opset: int) -> None:
    """Raise ModelError, naming the newest opset that onnxruntime supports, if `opset` is newer."""
    images, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (INPUT, OUTPUT)
    )
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [INPUT], [OUTPUT])], "any", [images], [logits])
    newest = onnx.defs.onnx_opset_version()
    while not _runs(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", newest)], ir_version=8)):
        newest -= 1
    if opset > newest:
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} runs no ONNX opset above {newest}, and compress.opset is {opset}: "
            "choose an older one, or leave compress.opset out."
        )


def _runs(proto: onnx.ModelProto) -> bool:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's errors have no base class of their own
        return False
    return True
