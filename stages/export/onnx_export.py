"""Export of a network to one ONNX file: written atomically, byte-identical each time, without local paths."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.exportable import OnnxFile, export_form, quiet
from kdpipe.stages.export.int4_weights import INT4_OPSET, has_int4, store_int4
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, PATH_END, session_options
from kdpipe.stages.export.stem_pass import fold_stem
from kdpipe.store.fs.checksums import write_with_sum

if TYPE_CHECKING:
    import onnx

SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key under which the exporter records the modules that a node belongs to."""

MAX_WEIGHT_BYTES = 2**31 - 2**20
"""The limit of protobuf, 2 GiB for a file, with room for the graph."""

EXPORTED_OPSET = 18
"""The oldest opset that torch's exporter writes; onnx converts to older ones."""


def export_onnx(
    model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str], opset: int | None = None
) -> None:
    """Write `model` in eval mode to an ONNX file; its mode and device stay unchanged.

    The input is "images" [batch, C, H, W], the output "logits" [batch, num_classes], both float32, for any batch size.
    A model from `prepare_qat` is written in INT8: unsigned activations, int8 weights, int32 biases, and Q/DQ around
    every operation; weights of 4 bits are INT4, in opset 21. INT4 layers from `prepare_int4` become MatMulNBits with
    two weights per byte. Node names begin with the path of the module whose forward they belong to.

    Args:
        model: A float network, a prepared INT8 or INT4 one, or one that is an ONNX file already.
        example: Images [B, C, H, W], of which only C, H, W count.
        path: The file; an existing one stays intact if the export fails.
        metadata: Entries of the file's `metadata_props`.
        opset: The version of ONNX's operators; None leaves it to the exporter.

    Raises:
        ModelError: If the model cannot be exported (with that opset), or the file cannot be written.
    """
    import onnx

    if isinstance(model, OnnxFile):
        proto = onnx.load_model_from_string(model.onnx_file())
    else:
        proto = _float_or_prepared(model, example, opset)
    if opset is not None:
        proto = _with_opset(proto, opset)
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    try:
        write_with_sum(path, proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise ModelError(f"the ONNX file {path} cannot be written: {error.strerror or cause(error)}.") from error


def _float_or_prepared(model: nn.Module, example: Tensor, opset: int | None) -> onnx.ModelProto:
    """Return the file of a network of torch. Raises ModelError if it cannot be exported, or is too large."""
    portable = export_form(model)
    if (num_bytes := _weight_bytes(portable)) > MAX_WEIGHT_BYTES:
        raise ModelError(
            f"the model cannot be exported to ONNX: its weights take {num_bytes / 2**30:.1f} GiB, and a file holds 2."
        )
    is_int4 = has_int4(portable)
    if is_int4 and opset is not None and opset < INT4_OPSET:
        raise ModelError(f"opset {opset} (compress.opset) has no weights of 4 bits: choose {INT4_OPSET} or later.")
    exported = INT4_OPSET if is_int4 and opset is None else opset
    proto = _to_onnx(portable, example, None if exported is None else max(exported, EXPORTED_OPSET))
    _name_by_module(proto)
    _strip(proto)
    if is_int4:
        store_int4(proto)
    fold_stem(proto)
    return proto


def _weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, as a file has them."""
    return sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))


def _to_onnx(model: nn.Module, example: Tensor, opset: int | None) -> onnx.ModelProto:
    """Run torch's exporter on a batch of two; some versions treat a batch size of one as a constant."""
    images = torch.zeros(2, *example.shape[1:])
    try:
        with quiet(), torch.no_grad():
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
    except Exception as error:
        origin: BaseException = error
        while origin.__cause__ is not None:  # the exporter's own messages are pages of debugging advice
            origin = origin.__cause__
        with_opset = "" if opset is None else f" with opset {opset} (compress.opset)"
        raise ModelError(
            f"the model cannot be exported to ONNX{with_opset} for inputs "
            f"[batch, {', '.join(map(str, example.shape[1:]))}]: {cause(origin)}"
        ) from error
    assert program is not None
    proto = program.model_proto
    if not proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param:
        raise ModelError("the model cannot be exported to ONNX: its forward hard-codes the batch size.")
    return proto


def _with_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a model to an opset. Raises ModelError if that fails, or onnxruntime does not run it."""
    import onnxruntime
    from onnx import version_converter

    try:
        if ("", opset) not in {(entry.domain, entry.version) for entry in proto.opset_import}:
            proto = version_converter.convert_version(proto, opset)
        onnxruntime.InferenceSession(proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
        fits = ("", opset) in {(entry.domain, entry.version) for entry in proto.opset_import}
    except Exception:  # neither library has a base class of errors
        fits = False
    if not fits:
        raise ModelError(
            f"the model cannot be written with opset {opset} (compress.opset), or onnxruntime does not run it: "
            "choose another one, or leave compress.opset out."
        )
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Remove stack traces with local paths, and scopes."""
    graph = proto.graph
    for described in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")


def _name_by_module(proto: onnx.ModelProto) -> None:
    """Prefix the name of each node with the path of its innermost module."""
    for node in proto.graph.node:
        recorded = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        scopes = ast.literal_eval(recorded)  # ['', 'layer1', 'layer1.0', 'relu_1']: modules, then the operation
        path = scopes[-2] if len(scopes) > 1 else ""
        if path:
            node.name = f"{path}{PATH_END}{node.name}"
