"""Try whether a network can be exported, before it is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT
from kdpipe.stages.export.runtimes import Session, open_file

TRIED_SIZES = (1, 3)
"""Batch sizes on which the file is run: the exporter itself sees a batch of two."""


def try_export(
    model: nn.Module, image_shape: tuple[int, int, int], *, opset: int | None = None, executorch: bool = False
) -> None:
    """Export `model` to a temporary ONNX file, and with `executorch` to a program, and run it on some batch sizes.

    Raises:
        ModelError: If that fails.
    """
    example = torch.zeros(2, *image_shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, example, path, metadata={}, opset=opset)
        _try_sizes(open_file(path), "ONNX file", image_shape)
        if executorch:
            from kdpipe.stages.export.executorch_program import export_executorch

            export_executorch(model, example, path.with_suffix(".pte"))
            _try_sizes(open_file(path.with_suffix(".pte")), "ExecuTorch program", image_shape)


def _try_sizes(session: Session, name: str, image_shape: tuple[int, int, int]) -> None:
    for size in TRIED_SIZES:
        try:
            (logits,) = session.run([OUTPUT], {INPUT: torch.zeros(size, *image_shape).numpy()})
        except Exception as error:  # onnxruntime has no base class of errors
            raise ModelError(f"its {name} does not run on a batch of {size}: {cause(error)}") from error
        if len(logits) != size:
            raise ModelError(f"its {name} makes {list(logits.shape)} of a batch of {size}.")
