"""Write the files of further runtimes, and check each against torch on the whole test set.

They are written once into `TARGET-seedN/KIND/` (FP16 files: `float16-seedN/KIND/`) beside the networks, timed there,
and copied to the artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from kdpipe.stages.compress.artifacts.write import Candidate
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.targets import FLOAT16, GRIDS, Grid, Target
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.executorch_program import export_executorch
from kdpipe.stages.export.float16 import MAX_FLOAT16, export_float16, largest_value
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.openvino_ir import export_openvino
from kdpipe.stages.export.tensorrt_check import num_2_4_weights, require_tensorrt
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.training.finalize import onnx_metadata, require_agreement
from kdpipe.stages.training.job_dir import read_json_file, write_json_file
from kdpipe.store import make_folders
from kdpipe.store.fs.checksums import damages, file_sha256, remove_with_sum, require_intact

FILES: dict[str, tuple[str, ...]] = {
    "openvino": ("model.xml", "openvino"),
    "executorch": ("model.pte", "executorch", "torch"),
}
"""By target, the file that its runtime opens, and the libraries that make it."""


@dataclass(frozen=True)
class RuntimeFile:
    """A network's file for one runtime.

    Attributes:
        path: The file that the runtime opens.
        figures: Its agreement with torch on the test set, its accuracy, its size, and the library's version.
        is_timed: Whether its latency on this CPU says anything about where it will run.
    """

    path: Path
    figures: Mapping[str, Any]
    is_timed: bool = True

    @property
    def parts(self) -> list[Path]:
        """The files that make it up."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.*"))


def check_targets(targets: Sequence[Target], candidate: Candidate) -> None:
    """Check a network's ONNX file against the rules of the targets that cannot run here. Raises ModelError.

    A layer whose weights have 2 zeros in every 4 must have them in the file.
    """
    if "tensorrt" in targets and grid_of(candidate.network) in (None, GRIDS["tensorrt"]):
        require_tensorrt(candidate.folder.onnx)
        wanted, found = _num_2_4_layers(candidate.network.model), num_2_4_weights(candidate.folder.onnx)
        if found < wanted:
            raise ModelError(
                f"{candidate.folder.onnx} has {found} weights with 2 zeros in every 4, and its network {wanted}: "
                "TensorRT would run the others without its sparse kernels."
            )


def _num_2_4_layers(model: nn.Module) -> int:
    """Count the layers with at least 2 zeros in every 4 consecutive input channels."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = [layer.weight for layer in layers if layer.weight.shape[1] % 4 == 0]
    fours = [weight.movedim(1, -1).reshape(-1, 4) for weight in weights]
    return sum(bool(((each != 0).sum(dim=1) <= 2).all()) for each in fours)


def grid_of(network: ModelBundle) -> Grid | None:
    """Return the grid of a network's activations, None of one that computes in float."""
    if "quantized" not in network.architecture:
        return None
    grid: Grid = network.architecture.get("grid", "affine")
    return grid


def write_runtime_files(
    config: CompressConfig, fine_tuning: FineTuneContext, candidate: Candidate, test: Evaluation
) -> dict[str, RuntimeFile]:
    """Write a network's files for the targets that need their own, and return them by target; present ones are kept.

    That in FP16, of float networks, is named "float16".

    Raises:
        ModelError: If a file cannot be made, or disagrees with the network.
    """
    check_targets(config.targets, candidate)
    grid, files = grid_of(candidate.network), dict[str, RuntimeFile]()
    for target in config.targets:
        if target in FILES and grid in (None, GRIDS[target]):
            files[target] = _target_file(target, fine_tuning, candidate, test)
    if config.float16 and grid is None:
        files[FLOAT16] = _float16_file(fine_tuning, candidate, test, config.opset)
    return files


def _target_file(target: Target, fine_tuning: FineTuneContext, candidate: Candidate, test: Evaluation) -> RuntimeFile:
    name, *libraries = FILES[target]
    onnx = candidate.folder.onnx  # stands for the network
    path = fine_tuning.root / f"{target}-seed{fine_tuning.seed}" / candidate.kind / name
    made_from = {"onnx_sha256": file_sha256(onnx)} | {library: version(library) for library in libraries}

    def write() -> dict[str, Any]:
        if target == "executorch":
            network, example = candidate.network, torch.zeros(2, *test.image_shape)
            export_executorch(network.model, example, path, metadata=onnx_metadata(network, test))
        else:
            export_openvino(onnx, path)
        found = require_agreement(path, candidate.network, test, whole_test=True)
        return {
            "version": version(target),
            "agreement": found.agreement,
            "max_logit_difference": found.max_logit_difference,
            "accuracy": found.accuracy,
            "bytes": sum(part.stat().st_size for part in RuntimeFile(path, {}).parts),
        }

    return RuntimeFile(path, _written_once(path.parent, onnx, made_from, write))


def _float16_file(
    fine_tuning: FineTuneContext, candidate: Candidate, test: Evaluation, opset: int | None
) -> RuntimeFile:
    onnx = candidate.folder.onnx
    path = fine_tuning.root / f"{FLOAT16}-seed{fine_tuning.seed}" / candidate.kind / "model_fp16.onnx"
    made_from = {"onnx_sha256": file_sha256(onnx), "onnxruntime": version("onnxruntime"), "opset": opset}

    def write() -> dict[str, Any]:
        largest = largest_value(onnx, test.batches(None))
        if not largest.fits:
            raise ModelError(
                f"{onnx} has values up to {largest.value:.3g} ({largest.where}), and float16 holds up to "
                f"{MAX_FLOAT16:,.0f}: set compress.float16 = false, or train a network with smaller activations."
            )
        with TemporaryDirectory() as temporary:
            source = onnx
            if opset is not None:
                source, example = Path(temporary) / "model.onnx", torch.zeros(2, *test.image_shape)
                metadata = onnx_metadata(candidate.network, test)
                export_onnx(candidate.network.model, example, source, metadata=metadata, opset=opset)
            export_float16(source, path)
        found = require_agreement(path, candidate.network, test, whole_test=True)
        return {
            "version": version("onnxruntime"),
            "agreement": found.agreement,
            "accuracy": found.accuracy,
            "max_logit_difference": found.max_logit_difference,
            "largest_value": largest.value,
            "largest_in": largest.where,
            "bytes": path.stat().st_size,
        }

    return RuntimeFile(path, _written_once(path.parent, onnx, made_from, write), is_timed=False)


def _written_once(
    folder: Path, onnx: Path, made_from: Mapping[str, Any], write: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return a file's figures: those in its folder, if it is there and whole, or those that writing it returns."""
    require_intact(onnx)
    record = folder / "figures.json"
    previous = read_json_file(record) or {}
    if previous.get("made_from") != made_from or next(damages(folder), None) is not None:
        make_folders([folder])
        remove_with_sum(record)
        previous = {"made_from": made_from, "figures": write()}
        write_json_file(record, previous)
    figures: dict[str, Any] = previous["figures"]
    return figures
