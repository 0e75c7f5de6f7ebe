"""Load a student trained elsewhere from its weights file, and measure it like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.resume import CUTS, as_pruned
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import RECORD
from kdpipe.stages.models.weights.file import read_weights
from kdpipe.stages.models.weights.match import find_state_dict
from kdpipe.stages.models.weights.state_dict import load_weights
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import FingerprintMismatch, differences


def load_external(path: Path, fresh: ModelBundle, class_names: Sequence[str]) -> ModelBundle:
    """Load weights from a .safetensors file or a torch state dict into the recipe's student `fresh`, in place.

    A file written by kdpipe records its architecture: it must be this student, pruned or not, for `class_names`.

    Raises:
        ModelError: If the file does not fit or is quantized.
        FingerprintMismatch: If it records another network.
    """
    record = _header(path)
    architecture = record.get("architecture", fresh.architecture)
    if not isinstance(architecture, Mapping) or not isinstance(architecture.get("widths", {}), Mapping):
        raise ModelError(f"the record in {path} is damaged: it has no valid architecture.")
    architecture = dict(architecture)
    if "quantized" in architecture:
        raise ModelError(
            f"{path} is already quantized ({architecture['quantized']}): pass the float student it was made from."
        )
    cuts = {key: architecture.pop(key) for key in CUTS if key in architecture}
    expected = {"architecture": dict(fresh.architecture), "class_names": list(class_names)}
    stored = {"architecture": architecture, "class_names": record.get("class_names", list(class_names))}
    if found := differences(stored, json.loads(json.dumps(expected))):
        raise FingerprintMismatch(
            f"the student in {path}", found, "Set student.model to that network, or pass another file."
        )
    network = as_pruned(fresh, cuts)
    load_weights(network.model, path)
    return network


def measure_external(fine_tuning: FineTuneContext, network: ModelBundle) -> dict[str, Any]:
    """Measure the external student and export its ONNX file, once, and return its figures."""
    folder = JobDir(fine_tuning.root / "given")
    folder.begin({"starts_from": network.identity, "test": fine_tuning.inputs["test"]})
    if (done := folder.result()) is not None:
        return done
    network.model.to(fine_tuning.device)
    test, validation = fine_tuning.evaluation(network.normalize), fine_tuning.validation(network.normalize)
    return finalize(folder, network, [], test, with_onnx=fine_tuning.exports_onnx, validation=validation)


def low_precision_dtypes(path: Path, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes narrower than float32 of a file's tensors, by the model's names: a BF16 student stays BF16."""
    stored: Mapping[str, Tensor] = find_state_dict(model, read_weights(path), str(path)).entries
    return {name: tensor.dtype for name, tensor in stored.items() if tensor.is_floating_point() and tensor.itemsize < 4}


def _header(path: Path) -> dict[str, Any]:
    """Return the record in a file of kdpipe; empty for any other, whose faults `load_weights` reports."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(RECORD, "{}"))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError):
        return {}
    return found if isinstance(found, dict) else {}
