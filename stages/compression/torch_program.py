"""A network as one torch.export program: written whole or not at all, equal bytes for equal networks.

    program = torch.export.load("model.pt2").module()
    logits = program(images)

The file is a zip of JSON and raw tensors, without pickle. The program of an INT8 network needs torch's decomposed
quantization operators, which `import torch.ao.quantization.fx._decomposed` registers; without it, it does not load.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from stages.compression.fake_quant import ActivationQuantizer
from stages.compression.int4_layers import int4_portable
from stages.compression.int8_graph import int8_graph
from stages.compression.silence import silence
from stages.errors import ModelError, cause
from store.durable import write_atomically

KEPT = {"val", "tensor_meta", "nn_module_stack"}
"""What stays of what torch.export tells of a node: its output's shape and type, and the path of its module. The rest
names source files of this machine and addresses in its memory."""


def export_program(model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` in eval mode, on the CPU: from images [batch, C, H, W], float32, to logits [batch, num_classes].

    A model from `prepare_qat` is written in INT8: int8 weights, int32 biases, and operators that quantize and
    dequantize around every operation, which torch computes in float. One from `prepare_int4` is written with two
    weights a byte, which the program unpacks to float on every call: small, and no faster. Any batch size runs, 1
    included; C, H, W are those of `example` [B, C, H, W]. `metadata` (normalisation, class names, ...) stands in the
    file's extra files, which torch.export.load(path, extra_files={"name": ""}) reads. The model, its mode and its
    device stay as they are. Raises ModelError if it cannot be exported or the file cannot be written; an earlier file
    is then still there.
    """
    quantized = any(isinstance(module, ActivationQuantizer) for module in model.modules())
    if quantized and isinstance(model, fx.GraphModule):
        portable: nn.Module = int8_graph(model)
    else:
        portable = int4_portable(model)
    content = _exported(portable.requires_grad_(False), example, dict(sorted((metadata or {}).items())))
    try:
        write_atomically(path, content)
    except OSError as fault:
        raise ModelError(f"the torch program {path} cannot be written: {fault.strerror or cause(fault)}.") from fault


def _exported(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """The bytes of the file; exported with a batch of two: one would be taken for a constant."""
    buffer = io.BytesIO()
    try:
        with silence(), torch.no_grad():
            images = torch.zeros(2, *example.shape[1:])
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
            _strip(program)
            torch.export.save(program, buffer, extra_files=metadata)
    except Exception as fault:
        if "specialized it to be a constant" in str(fault):
            said = "its forward has the batch size written in."
        else:
            said = cause(fault)
        shape = ", ".join(map(str, example.shape[1:]))
        raise ModelError(
            f"the model cannot be exported as a torch program for inputs [batch, {shape}]: {said}"
        ) from fault
    return buffer.getvalue()


def _strip(program: ExportedProgram) -> None:
    """Remove how the graph came about, and the example, which torch would save with pickle."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta = {name: value for name, value in node.meta.items() if name in KEPT}
    program.example_inputs = None
