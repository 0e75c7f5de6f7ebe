"""Export of a network as a torch.export program: written atomically, byte-identical for equal networks.

    program = torch.export.load("model.pt2").module()
    logits = program(images)

The file is a zip of JSON and raw tensors, without pickle. The program of an INT8 network needs torch's decomposed
quantization operators, which `import torch.ao.quantization.fx._decomposed` registers; without them it does not load.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.exportable import export_form, quiet
from kdpipe.store.fs.checksums import write_with_sum

KEPT_METADATA = {"val", "tensor_meta", "nn_module_stack"}
"""Node metadata that stays: the output's shape and type, and the module path. The rest holds local file names and
memory addresses."""


def export_program(model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` in eval mode, on the CPU; its mode and device stay unchanged.

    The program maps images [batch, C, H, W], float32, to logits [batch, num_classes], for any batch size. A model from
    `prepare_qat` is written in INT8: int8 weights, int32 biases, and Q/DQ operators, which torch computes in float. One
    from `prepare_int4` stores two weights per byte, which the program unpacks to float on every call: small, but no
    faster.

    Arguments are those of `export_onnx`; `torch.export.load(path, extra_files={"name": ""})` reads the metadata.

    Raises:
        ModelError: If the model cannot be exported, or the file cannot be written.
    """
    content = _exported(export_form(model).requires_grad_(False), example, dict(sorted((metadata or {}).items())))
    try:
        write_with_sum(path, content)
    except OSError as error:
        raise ModelError(f"the torch program {path} cannot be written: {error.strerror or cause(error)}.") from error


def _exported(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """Return the bytes of the file, exported with a batch of two; a batch size of one would become a constant."""
    buffer = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            images = torch.zeros(2, *example.shape[1:])
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
            _strip(program)
            torch.export.save(program, buffer, extra_files=metadata)
    except Exception as error:
        fixed_batch = "specialized it to be a constant" in str(error)
        reason = "its forward hard-codes the batch size." if fixed_batch else cause(error)
        shape = ", ".join(map(str, example.shape[1:]))
        raise ModelError(
            f"the model cannot be exported as a torch program for inputs [batch, {shape}]: {reason}"
        ) from error
    return buffer.getvalue()


def _strip(program: ExportedProgram) -> None:
    """Remove how the graph was traced, and the example input, which torch would save with pickle."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta = {name: value for name, value in node.meta.items() if name in KEPT_METADATA}
    program.example_inputs = None
