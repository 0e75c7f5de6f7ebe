"""Saved networks: weights with a JSON record. No module is pickled: the record describes the network to build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, RunError
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import FingerprintMismatch, differences


def save_model(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the network's state with `record`, whose `architecture` describes the network to build."""
    save_tensors(path, model.state_dict(), record)


def finished_record(folder: JobDir, needed_by: str) -> dict[str, Any]:
    """Return the record of a finished job's network; raises RunError, naming the command to run, if there is none."""
    if folder.result() is None:
        raise RunError(f"there is no finished network in {folder.path}: run `{needed_by}` first.")
    if not folder.model.exists():
        raise RunError(f"{folder.model} is missing: delete the folder {folder.path}, and run `{needed_by}` again.")
    return load_tensors(folder.model)[1]


def load_finished(folder: JobDir, model: nn.Module, architecture: Mapping[str, Any], needed_by: str) -> dict[str, Any]:
    """Load a finished job's weights into `model` and return the record stored with them.

    Raises RunError, naming the command `needed_by`, if the job is not finished, or the file holds other weights than
    the job's results name; FingerprintMismatch if it holds another architecture than `architecture`.
    """
    record = finished_record(folder, needed_by)
    advice = f"Use the recipe that trained it, or delete the folder {folder.path} to train it again."
    if found := differences(record.get("architecture"), dict(architecture)):
        raise FingerprintMismatch(f"the network {folder.model}", found, advice)
    try:
        model.load_state_dict(load_tensors(folder.model)[0])
    except RuntimeError as error:
        raise ModelError(f"{folder.model} does not fit its own architecture ({error}). {advice}") from error
    if (folder.result() or {})["identity"]["weights_sha256"] != weights_sha256(model):
        raise RunError(
            f"{folder.model} does not hold the weights that {folder.path / 'result.json'} names: one of them is "
            f"damaged or was replaced. Restore it from a copy, or delete the folder {folder.path} and run "
            f"`{needed_by}` again."
        )
    return record
