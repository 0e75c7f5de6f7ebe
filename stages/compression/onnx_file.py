"""A network as one ONNX file: written whole or not at all, the same bytes each time, nothing of this machine in it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from stages.compression.fake_quant import ActivationQuantizer
from stages.compression.int4_layers import int4_portable
from stages.compression.int8_graph import int8_graph
from stages.compression.onnx_check import OnnxAgreement, check_onnx
from stages.compression.onnx_graph import INPUT, OUTPUT, PATH_END, op_counts, open_session
from stages.compression.onnx_opset import EXPORTED_OPSET, brought_back, require_known_opset
from stages.compression.quick_stem import quicken_stem
from stages.compression.silence import silence
from stages.errors import ModelError, cause
from store.durable import write_atomically

__all__ = ["INPUT", "OUTPUT", "OnnxAgreement", "check_onnx", "export_onnx", "op_counts", "open_session"]

SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter tells of which modules a node is part


def export_onnx(
    model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str], opset: int | None = None
) -> None:
    """Write `model` in eval mode: input "images" [batch, C, H, W], output "logits" [batch, num_classes], both float32.

    A model from `prepare_qat` is written in INT8: unsigned activations, int8 weights, int32 biases, and quantize and
    dequantize around every operation; the INT4 layers of one from `prepare_int4` are MatMulNBits, with two weights a
    byte. Any batch size runs, 1 included; C, H, W are those of `example` [B, C, H, W].
    `metadata` (normalisation, class names, ...) stands in the file's `metadata_props`. `opset`: the version of ONNX's
    operators; None leaves it to the exporter. The names of the nodes begin with the path of the module whose forward
    they are part of. The model, its mode and its device stay as they are. Raises ModelError if it cannot be exported,
    or not with that opset, or the file cannot be written; an earlier file at `path` is then still there.
    """
    quantized = any(isinstance(module, ActivationQuantizer) for module in model.modules())
    if quantized and isinstance(model, fx.GraphModule):
        portable: nn.Module = int8_graph(model)
    else:
        portable = int4_portable(model)
    if opset is not None:
        require_known_opset(opset)
    proto = _to_onnx(portable, example, None if opset is None else max(opset, EXPORTED_OPSET))
    _name_by_module(proto)
    _strip(proto)
    quicken_stem(proto)
    if opset is not None and opset < EXPORTED_OPSET:
        proto = brought_back(proto, opset)
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    try:
        write_atomically(path, proto.SerializeToString(deterministic=True))
    except OSError as fault:
        raise ModelError(f"the ONNX file {path} cannot be written: {fault.strerror or cause(fault)}.") from fault


def _to_onnx(model: nn.Module, example: Tensor, opset: int | None) -> onnx.ModelProto:
    """torch's exporter, on a batch of two: with one, versions of it take the batch size for a constant."""
    images = torch.zeros(2, *example.shape[1:])
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as fault:
        origin = fault.__cause__ or fault  # the exporter's own words are a page of advice to its makers
        with_opset = "" if opset is None else f" with opset {opset} (compress.opset)"
        raise ModelError(
            f"the model cannot be exported to ONNX{with_opset} for inputs "
            f"[batch, {', '.join(map(str, example.shape[1:]))}]: {cause(origin)}"
        ) from fault
    assert program is not None
    proto = program.model_proto
    if not proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param:
        raise ModelError("the model cannot be exported to ONNX: its forward has the batch size written in.")
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter tells of how it came by the graph: stack traces with this machine's paths, scopes."""
    graph = proto.graph
    for described in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")


def _name_by_module(proto: onnx.ModelProto) -> None:
    """Put the path of the innermost module before the name of each node: what is kept of the exporter's scopes."""
    for node in proto.graph.node:
        told = next((each.value for each in node.metadata_props if each.key == SCOPES), "[]")
        scopes = ast.literal_eval(told)  # ['', 'layer1', 'layer1.0', 'relu_1']: modules, then the operation
        path = scopes[-2] if len(scopes) > 1 else ""
        if path:
            node.name = f"{path}{PATH_END}{node.name}"
