"""A trained network on disk: its weights, with a record of what they are. No module is pickled: the recipe says what
to build, the file says what to put into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stages.errors import ModelError, RunError
from stages.job_folder import JobFolder
from stages.models.weights import weights_sha256
from stages.tensor_file import load_tensors, save_tensors
from store import FingerprintMismatch, differences


def save_model(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the network's state with `record`, whose `architecture` says what to build to put it back."""
    save_tensors(path, model.state_dict(), record)


def finished_record(folder: JobFolder, needed_by: str) -> dict[str, Any]:
    """The record of a finished job's network. Raises RunError, naming the stage that makes it, if there is none."""
    if folder.result() is None:
        raise RunError(f"there is no finished network in {folder.path}: run `{needed_by}` first.")
    if not folder.model.exists():
        raise RunError(f"{folder.model} is gone: delete the folder {folder.path}, and run `{needed_by}` again.")
    return load_tensors(folder.model)[1]


def load_finished(
    folder: JobFolder, model: nn.Module, architecture: Mapping[str, Any], needed_by: str
) -> dict[str, Any]:
    """Put a finished job's weights into `model`; returns the record that was kept with them.

    Raises RunError where the job is not finished; FingerprintMismatch where the file holds another architecture than
    wanted, or other weights than the job finished with.
    """
    record = finished_record(folder, needed_by)
    advice = f"Use the recipe that trained it, or delete the folder {folder.path} to train it afresh."
    if found := differences(record.get("architecture"), dict(architecture)):
        raise FingerprintMismatch(f"the network {folder.model}", found, advice)
    try:
        model.load_state_dict(load_tensors(folder.model)[0])
    except RuntimeError as error:
        raise ModelError(f"{folder.model} does not fit its own architecture ({error}). {advice}") from error
    finished_with = (folder.result() or {})["identity"]["weights_sha256"]
    if found := differences(finished_with, weights_sha256(model), "weights_sha256"):
        raise FingerprintMismatch(f"the job in {folder.path}", found, advice)
    return record
