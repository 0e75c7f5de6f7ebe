"""INT8 by onnxruntime's own quantizer, for networks that torch.fx cannot trace: calibration of their ONNX file.

The result is a file, not a network of torch: nothing of it can be trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.exportable import quiet
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, module_path, session_options

if TYPE_CHECKING:
    import onnx
    import onnxruntime

LAYERS = ("Conv", "Gemm", "MatMul")
MOVES = ("MaxPool", "AveragePool", "GlobalAveragePool", "Relu", "Clip", "Concat", "Reshape", "Flatten", "Transpose")
SUMS = ("Add", "Mul")
"""Rounded but in transformers, whose sums and products are read by operations that stay float."""


class OnnxQuantized(nn.Module):
    """An INT8 network as the ONNX file that onnxruntime's quantizer made; onnxruntime's CPU computes it.

    Attributes:
        reason: Why it is not quantized by torch: what torch.fx cannot trace. Empty where a recipe wants it so.
        file: The bytes of the ONNX file, uint8 [N]; none before `calibrate_onnx`.
    """

    file: Tensor

    def __init__(self, reason: str = "") -> None:
        super().__init__()
        self.reason = reason
        self.register_buffer("file", torch.zeros(0, dtype=torch.uint8))
        self._session: onnxruntime.InferenceSession | None = None

    def onnx_file(self) -> bytes:
        """Return the ONNX file. Raises ModelError if it was never calibrated."""
        if not len(self.file):
            raise ModelError("the model was not calibrated: its INT8 file does not exist.")
        return self.file.cpu().numpy().tobytes()

    def reserve(self, num_bytes: int) -> None:
        """Make room for the file of a state dict that is about to be loaded."""
        self.file = torch.zeros(num_bytes, dtype=torch.uint8, device=self.file.device)
        self._session = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of normalized images [B, C, H, W]."""
        if self._session is None:
            import onnxruntime

            try:
                self._session = onnxruntime.InferenceSession(
                    self.onnx_file(), session_options(), providers=["CPUExecutionProvider"]
                )
            except ModelError:
                raise
            except Exception as error:  # onnxruntime has no base class of errors
                raise ModelError(f"onnxruntime cannot load the INT8 network: {cause(error)}") from error
        logits = self._session.run([OUTPUT], {INPUT: images.detach().cpu().float().contiguous().numpy()})[0]
        return torch.from_numpy(logits).to(images.device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: a session cannot be copied."""
        return {**self.__dict__, "_session": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}file")
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8 and stored.dim() == 1:
            self.reserve(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)


def calibrate_onnx(
    quantized: OnnxQuantized,
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    image_shape: tuple[int, int, int],
    exclude: Sequence[str] = (),
    grid: Grid = "affine",
) -> None:
    """Quantize `model` with onnxruntime, and put the file into `quantized`; equal calls give equal bytes.

    Activations have the range that they take on `batches`; weights have one scale per output channel.

    Args:
        quantized: Receives the file.
        model: The float network; it stays unchanged.
        batches: Normalized images [B, C, H, W], on any device.
        image_shape: (C, H, W).
        exclude: Paths of modules that stay float.
        grid: Of the activations.

    Raises:
        ModelError: If the model cannot be exported or quantized, or `exclude` names a missing module.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.batches, None)
            return None if images is None else {INPUT: images.detach().cpu().float().contiguous().numpy()}

    names = {path for path, _ in model.named_modules()}
    if missing := [path for path in exclude if path not in names]:
        raise ModelError(f"compress.quantize.exclude: the model has no module {missing[0]!r}.")
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, path = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        export_onnx(model, torch.zeros(2, *image_shape), source, metadata={})
        symmetric = grid == "symmetric"
        try:
            with quiet():
                quant_pre_process(source, prepared)
                graph = onnx.load(prepared).graph
                quantize_static(
                    prepared,
                    path,
                    Images(),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=_rounded_types(graph),
                    nodes_to_exclude=_nodes_of(graph, exclude),
                    per_channel=True,
                    activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    extra_options={
                        "MatMulConstBOnly": True,
                        "ActivationSymmetric": symmetric,
                        "QuantizeBias": not symmetric,
                    },
                )
                proto = onnx.load(path)
        except Exception as error:  # onnxruntime has no base class of errors
            raise ModelError(f"onnxruntime's quantizer cannot quantize the model: {cause(error)}") from error
    _tidy(proto)
    if not any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        reason = "every layer is in quantize.exclude" if exclude else "no layer of it has an INT8 form"
        raise ModelError(f"the model has nothing left to quantize: {reason}. Take 'quantize' out of compress.steps.")
    quantized.reserve(0)
    quantized.file = torch.frombuffer(bytearray(proto.SerializeToString(deterministic=True)), dtype=torch.uint8)


def _rounded_types(graph: onnx.GraphProto) -> list[str]:
    """Return the operators to quantize."""
    is_transformer = any(node.op_type in ("LayerNormalization", "Softmax") for node in graph.node)
    return [*LAYERS, *MOVES, *([] if is_transformer else SUMS)]


def _nodes_of(graph: onnx.GraphProto, paths: Sequence[str]) -> list[str]:
    """Return the names of the nodes that belong to modules, or read their weights."""
    weights = {tensor.name for tensor in graph.initializer}

    def is_within(name: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in paths)

    return [
        node.name
        for node in graph.node
        if is_within(module_path(node)) or any(is_within(name) for name in weights.intersection(node.input))
    ]


def _tidy(proto: onnx.ModelProto) -> None:
    """Leave the logits float, and remove the domains of operators that no node has."""
    graph = proto.graph
    makers = {value: node for node in graph.node for value in node.output}
    last = makers.get(OUTPUT)
    if last is not None and last.op_type == "DequantizeLinear" and last.input[0] in makers:
        rounding = makers[last.input[0]]
        source = makers.get(rounding.input[0])
        readers = [node for node in graph.node if rounding.input[0] in node.input]
        if source is not None and rounding.op_type == "QuantizeLinear" and len(readers) == 1:
            graph.node.remove(last)
            graph.node.remove(rounding)
            source.output[list(source.output).index(rounding.input[0])] = OUTPUT
    used = {node.domain for node in graph.node} | {""}
    domains = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(domains)
