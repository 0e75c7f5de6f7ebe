"""A network as one ONNX file: written whole or not at all, the same bytes each time, nothing of this machine in it."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from stages.cause import cause
from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import ActivationQuantizer
from stages.compression.int8_graph import int8_graph
from stages.errors import ModelError
from store.durable import write_atomically

INPUT, OUTPUT = "images", "logits"
QUIET = 3  # onnxruntime's log level for errors


@dataclass(frozen=True)
class OnnxAgreement:
    """How far a file and its network agree on `num_samples` images.

    top1_agreement: the share of images with the same top-1 class. max_logit_difference: the largest one of any logit.
    """

    num_samples: int
    top1_agreement: float
    max_logit_difference: float


def export_onnx(model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write `model` in eval mode: input "images" [batch, C, H, W], output "logits" [batch, num_classes], both float32.

    A model from `prepare_qat` is written in INT8: unsigned activations, int8 weights, int32 biases, and quantize and
    dequantize around every operation. Any batch size runs, 1 included; C, H, W are those of `example` [B, C, H, W].
    `metadata` (normalisation, class names, ...) stands in the file's `metadata_props`. The model, its mode and its
    device stay as they are. Raises ModelError if it cannot be exported or the file cannot be written.
    """
    quantized = any(isinstance(module, ActivationQuantizer) for module in model.modules())
    if quantized and isinstance(model, fx.GraphModule):
        portable: nn.Module = int8_graph(model)
    else:
        portable = bare_copy(model).cpu().eval()
    proto = _to_onnx(portable, example)
    _strip(proto)
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    try:
        write_atomically(path, proto.SerializeToString(deterministic=True))
    except OSError as fault:
        raise ModelError(f"the ONNX file {path} cannot be written: {fault.strerror}.") from fault


def _to_onnx(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """torch's exporter, on a batch of two: with one, versions of it take the batch size for a constant."""
    images = torch.zeros(2, *example.shape[1:])
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as fault:
        origin = fault.__cause__ or fault  # the exporter's own words are a page of advice to its makers
        raise ModelError(
            f"the model cannot be exported to ONNX for inputs [batch, {', '.join(map(str, example.shape[1:]))}]: "
            f"{cause(origin)}"
        ) from fault
    assert program is not None
    proto = program.model_proto
    if not proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param:
        raise ModelError("the model cannot be exported to ONNX: its forward has the batch size written in.")
    return proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress, warnings and log lines off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter tells of how it came by the graph: stack traces with this machine's paths, scopes."""
    graph = proto.graph
    for described in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")


def open_session(
    path: Path, *, num_threads: int = 0, optimised_path: Path | None = None
) -> onnxruntime.InferenceSession:
    """onnxruntime's CPU session over an ONNX file; `num_threads` 0 leaves the number to it.

    With `optimised_path`, the graph that it really runs is written there. Raises ModelError if `path` is missing or
    is no ONNX network.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = num_threads
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
    if not path.is_file():
        raise ModelError(f"there is no ONNX file at {path}.")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:
        raise ModelError(f"onnxruntime cannot load {path}: {cause(fault)}") from fault


def check_onnx(path: Path, model: nn.Module, images: Tensor, batch_size: int) -> OnnxAgreement:
    """Run the file at `path` and `model` in eval mode, on the CPU, over `images` [N, C, H, W] and compare their logits.

    An INT8 file may differ from the prepared model by a few quantization steps, where a value lies halfway between two.
    """
    session = open_session(path)
    reference = bare_copy(model).cpu().eval()
    agreements, differences = [], []
    for batch in torch.split(images.cpu().float(), batch_size):
        found = torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])
        with torch.no_grad():
            expected = reference(batch)
        agreements.append(found.argmax(dim=1) == expected.argmax(dim=1))
        differences.append((found - expected).abs().max())  # torch's max, unlike Python's, lets a NaN through
    return OnnxAgreement(
        num_samples=len(images),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        max_logit_difference=float(torch.stack(differences).max()),
    )


def op_counts(path: Path) -> dict[str, int]:
    """How often each operator stands in the graph that onnxruntime's CPU runs after its optimisations, by name.

    An INT8 file is fused where this shows QLinearConv and QGemm and neither Conv nor Gemm.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, optimised_path=optimised)
        counts = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    return dict(sorted(counts.items()))
