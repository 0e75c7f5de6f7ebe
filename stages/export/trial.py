"""Try whether a network can be exported, before it is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, open_session

TRIED_SIZES = (1, 3)
"""Batch sizes on which the file is run: the exporter itself sees a batch of two."""


def try_export(model: nn.Module, image_shape: tuple[int, int, int], *, opset: int | None = None) -> None:
    """Export `model` to a temporary ONNX file and run it on batches of other sizes. Raises ModelError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, torch.zeros(2, *image_shape), path, metadata={}, opset=opset)
        session = open_session(path)
        for size in TRIED_SIZES:
            try:
                (logits,) = session.run([OUTPUT], {INPUT: torch.zeros(size, *image_shape).numpy()})
            except Exception as error:  # onnxruntime has no base class of errors
                raise ModelError(f"its ONNX file does not run on a batch of {size}: {cause(error)}") from error
            if len(logits) != size:
                raise ModelError(f"its ONNX file makes {list(logits.shape)} of a batch of {size}.")
