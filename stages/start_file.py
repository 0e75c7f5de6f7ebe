"""Save a pruned network before its fine-tuning, so that a killed job resumes from the same one.

What pruning measures (a latency, on a GPU also a gradient) would differ the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.compression.widths import apply_widths
from stages.errors import ModelError, RunError, cause
from stages.job_folder import JobFolder
from stages.model_file import save_model
from stages.network import Network
from stages.tensor_file import load_tensors


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned network before its fine-tuning, and facts about the pruning, as JSON."""

    network: Network
    facts: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """The record in the file's header."""
        return {"architecture": dict(self.network.architecture), "facts": dict(self.facts)}


def pruned_path(folder: JobFolder) -> Path:
    """Return the path of a job's pruned network."""
    return folder.path / "start.safetensors"


def save_pruned(path: Path, checkpoint: PrunedCheckpoint) -> None:
    """Write it atomically."""
    save_model(path, checkpoint.network.model, checkpoint.record)


def load_pruned(path: Path, fresh: Network) -> PrunedCheckpoint:
    """Load a pruned network, fine-tuned or not, into `fresh`, the unpruned network, which is modified.

    Raises:
        RunError: If the file is not of this job, or is damaged.
    """
    tensors, record = load_tensors(path)
    try:
        network = with_widths(fresh, record["architecture"].get("widths"))
        network.model.load_state_dict(tensors)
        return PrunedCheckpoint(network, {"channel_ratio": float(record["facts"]["channel_ratio"]), **record["facts"]})
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
        raise RunError(
            f"{path} is from another job, or damaged ({cause(error)}): delete it, and run the command again."
        ) from error


def with_widths(fresh: Network, widths: Mapping[str, Any] | None) -> Network:
    """Return a network cut to recorded widths, in place; unchanged if there are none, or it has them already."""
    if widths is None or widths == fresh.architecture.get("widths"):
        return fresh
    architecture = {**fresh.architecture, "widths": dict(widths)}
    return Network(apply_widths(fresh.model, widths), architecture, fresh.normalise)
