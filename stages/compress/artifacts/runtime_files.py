"""Write the files of further runtimes, and check each against torch on the whole test set.

They are written once into `TARGET-seedN/KIND/` beside the networks, timed there, and copied to the artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe.stages.compress.artifacts.write import Candidate
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.targets import GRIDS, Grid, Target
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.executorch_program import export_executorch
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
    """

    path: Path
    figures: Mapping[str, Any]

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
    targets: Sequence[Target], fine_tuning: FineTuneContext, candidate: Candidate, test: Evaluation
) -> dict[str, RuntimeFile]:
    """Write a network's files for the targets that need their own, and return them by target; present ones are kept.

    Raises:
        ModelError: If a file cannot be made, or disagrees with the network.
    """
    check_targets(targets, candidate)
    grid = grid_of(candidate.network)
    return {
        target: _written(target, fine_tuning, candidate, test)
        for target in targets
        if target in FILES and grid in (None, GRIDS[target])
    }


def _written(target: Target, fine_tuning: FineTuneContext, candidate: Candidate, test: Evaluation) -> RuntimeFile:
    """Write a network's file for a target, unless it is there and whole, and check it against torch."""
    name, *libraries = FILES[target]
    folder = fine_tuning.root / f"{target}-seed{fine_tuning.seed}" / candidate.kind
    path, record = folder / name, folder / "figures.json"
    require_intact(candidate.folder.onnx)
    # The ONNX file stands for the network.
    made_from = {"onnx_sha256": file_sha256(candidate.folder.onnx)} | {
        library: version(library) for library in libraries
    }
    previous = read_json_file(record) or {}
    if previous.get("made_from") != made_from or next(damages(folder), None) is not None:
        make_folders([folder])
        remove_with_sum(record)
        if target == "executorch":
            network, example = candidate.network, torch.zeros(2, *test.image_shape)
            export_executorch(network.model, example, path, metadata=onnx_metadata(network, test))
        else:
            export_openvino(candidate.folder.onnx, path)
        found = require_agreement(path, candidate.network, test, whole_test=True)
        previous = {
            "made_from": made_from,
            "figures": {
                "version": version(target),
                "agreement": found.agreement,
                "max_logit_difference": found.max_logit_difference,
                "accuracy": found.accuracy,
                "bytes": sum(part.stat().st_size for part in RuntimeFile(path, {}).parts),
            },
        }
        write_json_file(record, previous)
    return RuntimeFile(path, previous["figures"])
