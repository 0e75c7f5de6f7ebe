"""A trained network on disk: its weights, with a record of what they are. No module is pickled: the recipe says what
to build, the file says what to put into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stages.errors import ModelError, RunError
from stages.tensor_file import load_tensors, save_tensors
from store import FingerprintMismatch, differences


def save_model(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the network's state with `record`, whose `architecture` says what to build to put it back."""
    save_tensors(path, model.state_dict(), record)


def read_record(path: Path, needed_by: str) -> dict[str, Any]:
    """The record of a network on disk. Raises RunError, naming the stage that makes it, if there is none."""
    if not path.exists():
        raise RunError(f"there is no trained network at {path}: run `{needed_by}` first.")
    return load_tensors(path)[1]


def load_model(path: Path, model: nn.Module, architecture: Mapping[str, Any]) -> None:
    """Put the weights at `path` into `model`. Raises FingerprintMismatch if they are another architecture's."""
    tensors, record = load_tensors(path)
    found = differences(record.get("architecture"), dict(architecture))
    if found:
        advice = "Use the recipe that trained it, or another run folder."
        raise FingerprintMismatch(f"the network {path}", found, advice)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit its own architecture ({error}): train it again.") from error
