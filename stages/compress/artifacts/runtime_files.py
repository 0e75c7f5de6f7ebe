"""Write the files of further runtimes, and check each against torch on the whole test set.

They are written once into `TARGET-seedN/KIND/` beside the networks, timed there, and copied to the artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdpipe.stages.compress.artifacts.write import Candidate
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.targets import GRIDS, Grid, Target
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.openvino_ir import export_openvino
from kdpipe.stages.export.tensorrt_check import require_tensorrt
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.training.finalize import require_agreement
from kdpipe.stages.training.job_dir import read_json_file, write_json_file
from kdpipe.store import make_folders
from kdpipe.store.fs.checksums import damages, file_sha256, remove_with_sum, require_intact


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
    """Check a network's ONNX file against the rules of the targets that cannot run here. Raises ModelError."""
    if "tensorrt" in targets and grid_of(candidate.network) in (None, GRIDS["tensorrt"]):
        require_tensorrt(candidate.folder.onnx)


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
    if "openvino" not in targets or grid_of(candidate.network) not in (None, GRIDS["openvino"]):
        return {}
    folder = fine_tuning.root / f"openvino-seed{fine_tuning.seed}" / candidate.kind
    path, record = folder / "model.xml", folder / "figures.json"
    require_intact(candidate.folder.onnx)
    made_from = {"onnx_sha256": file_sha256(candidate.folder.onnx), "openvino": version("openvino")}
    previous = read_json_file(record) or {}
    if previous.get("made_from") != made_from or next(damages(folder), None) is not None:
        make_folders([folder])
        remove_with_sum(record)
        export_openvino(candidate.folder.onnx, path)
        found = require_agreement(path, candidate.network, test, whole_test=True)
        size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        previous = {
            "made_from": made_from,
            "figures": {
                "version": version("openvino"),
                "agreement": found.agreement,
                "accuracy": found.accuracy,
                "bytes": size,
            },
        }
        write_json_file(record, previous)
    return {"openvino": RuntimeFile(path, previous["figures"])}
