"""A network as one ONNX file: written whole or not at all, the same bytes each time, nothing of this machine in it."""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper, version_converter
from torch import Tensor, fx, nn

from stages.cause import cause
from stages.compression.fake_quant import ActivationQuantizer
from stages.compression.int4_layers import int4_portable
from stages.compression.int8_graph import int8_graph
from stages.compression.onnx_check import OnnxAgreement, check_onnx
from stages.compression.onnx_graph import INPUT, OUTPUT, PATH_END, op_counts, open_session, session_options
from stages.compression.silence import silence
from stages.errors import ModelError
from store.durable import write_atomically

__all__ = ["INPUT", "OUTPUT", "OnnxAgreement", "check_onnx", "export_onnx", "op_counts", "open_session"]

EXPORTED_OPSET = 18
"""The oldest opset in which torch's exporter writes; a file in an older one is converted, where that can be."""

STEM = {"kernel_shape": [7, 7], "strides": [2, 2], "pads": [3, 3, 3, 3], "dilations": [1, 1], "group": 1}
"""The convolution with which ResNets begin."""

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
        _require_known_opset(opset)
    proto = _to_onnx(portable, example, None if opset is None else max(opset, EXPORTED_OPSET))
    _name_by_module(proto)
    _strip(proto)
    _quicken_stem(proto)
    if opset is not None and opset < EXPORTED_OPSET:
        proto = _brought_back(proto, opset)
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


def _brought_back(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The network in an opset older than the exporter's. ModelError, with the least one that works, if not in this.

    The exporter would do this too, but hand out its own opset where it fails, and without a word.
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
        f"the model cannot be written with ONNX opset {opset} (compress.opset): the least that holds its operators is "
        f"{candidate}."
    )


def _require_known_opset(opset: int) -> None:
    """ModelError if onnxruntime does not know an opset, with the newest one that it knows."""
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
            "take an older one, or leave the choice to torch's exporter."
        )


def _runs(proto: onnx.ModelProto) -> bool:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's errors have no base class of their own
        return False
    return True


def _quicken_stem(proto: onnx.ModelProto) -> None:
    """Write a STEM over INT8 images [B, C, H, W], C at most 4, as a 4x4 convolution over [B, 4C, H/2, W/2].

    Each square of four pixels becomes one pixel of four times the channels, and the weight an 8x8 one with zeros at its
    top and left: the very same integer sums. onnxruntime gathers what a kernel covers pixel by pixel, and three bytes
    at a time are slow: the stem of a ResNet-18 took 0.6 to 0.7 of its time like this (64 pixels, one x86 core).
    """
    graph = proto.graph
    producers = {value: node for node in graph.node for value in node.output}
    num_readers = Counter(value for node in graph.node for value in node.input)
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in conv.attribute}
        read, weight = (producers.get(value) for value in conv.input[:2])
        rounding = producers.get(read.input[0]) if read else None
        if not (read and weight and rounding and all(attributes.get(name) == value for name, value in STEM.items())):
            continue
        reads_images = rounding.op_type == "QuantizeLinear" and rounding.input[0] == INPUT
        shared = [value for value in (*read.output, *weight.output, weight.input[0]) if num_readers[value] > 1]
        if reads_images and not shared:
            images = graph.input[0].type.tensor_type.shape.dim
            if images[1].dim_value <= 4 and all(side.dim_value and side.dim_value % 2 == 0 for side in images[2:]):
                _fold_pixels(graph, conv, read, weight)


def _fold_pixels(graph: onnx.GraphProto, conv: onnx.NodeProto, read: onnx.NodeProto, weight: onnx.NodeProto) -> None:
    """Do it to one convolution, whose inputs the nodes `read` and `weight` dequantize."""
    tensor = next((each for each in graph.initializer if each.name == weight.input[0]), None)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT8:
        return
    values = np.pad(numpy_helper.to_array(tensor), ((0, 0), (0, 0), (1, 0), (1, 0)))
    out_channels, in_channels = values.shape[:2]
    squares = values.reshape(out_channels, in_channels, 4, 2, 4, 2).transpose(0, 3, 5, 1, 2, 4)
    tensor.CopyFrom(numpy_helper.from_array(squares.reshape(out_channels, 4 * in_channels, 4, 4).copy(), tensor.name))
    fold = onnx.helper.make_node(
        "SpaceToDepth",
        [read.input[0]],
        [f"{read.input[0]}_folded"],
        name=f"{conv.name}_fold_pixels",
        blocksize=2,
    )
    graph.node.insert(list(graph.node).index(read), fold)
    read.input[0] = fold.output[0]
    changes = {"kernel_shape": [4, 4], "strides": [1, 1], "pads": [2, 2, 1, 1]}
    for attribute in conv.attribute:
        if attribute.name in changes:
            attribute.ints[:] = changes[attribute.name]
    stale = {read.output[0], weight.output[0], tensor.name}
    kept = [each for each in graph.value_info if each.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(kept)


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
