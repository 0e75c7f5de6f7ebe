"""Time what follows a training: the export of the network, and the latency of its file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.evaluation.latency import WARM_UP_ROUNDS, measure_latency
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.models.bundle import ModelBundle

NUM_TIMED = 1
"""Rounds of a batch of one image that are timed, after those that warm up."""


@dataclass(frozen=True)
class ExportTime:
    """Seconds of an export, and of the file's run on one image.

    Attributes:
        export_s: Writing the file.
        image_s: One image in onnxruntime.
    """

    export_s: float
    image_s: float

    def latency_s(self, config: CompressConfig) -> float:
        """Return the time in which `kdpipe compress` measures this network: each timed batch follows an untimed one."""
        batches = 2 * (config.latency_rounds + WARM_UP_ROUNDS)
        return batches * sum(config.latency_batch_sizes) * self.image_s


def time_export(network: ModelBundle, image_shape: Sequence[int], opset: int | None) -> ExportTime:
    """Export a network to a temporary file and run it."""
    channels, height, width = image_shape
    with tempfile.TemporaryDirectory(prefix="kdpipe-plan-") as folder:
        path = Path(folder) / "model.onnx"
        model = network.model.cpu().eval()
        started = time.perf_counter()
        export_onnx(model, torch.zeros(2, channels, height, width), path, metadata={}, opset=opset)
        export_s = time.perf_counter() - started
        found = measure_latency({"": path}, None, [1], num_rounds=NUM_TIMED, num_threads=1)
    return ExportTime(export_s, found[""][1].p50_ms / 1000)
