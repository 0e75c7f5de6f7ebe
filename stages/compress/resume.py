"""Save a pruned network before its fine-tuning, so that a killed job resumes from the same one.

What pruning measures (a latency, on a GPU also a gradient) would differ the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.stages.compress.pruning.widths import apply_widths
from kdpipe.stages.errors import ModelError, RunError, cause
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.saved_model import finished_record, load_finished, save_model


@dataclass(frozen=True)
class TrainedModel:
    """A finished network from which others start: its identity, and a function that loads a new copy."""

    identity: Mapping[str, Any]
    load: Callable[[], ModelBundle]


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned network before its fine-tuning, and facts about the pruning, as JSON."""

    network: ModelBundle
    facts: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        return {"architecture": dict(self.network.architecture), "facts": dict(self.facts)}


def pruned_path(folder: JobDir) -> Path:
    return folder.path / "start.safetensors"


def save_pruned(path: Path, checkpoint: PrunedCheckpoint) -> None:
    save_model(path, checkpoint.network.model, checkpoint.record)


def load_pruned(path: Path, fresh: ModelBundle) -> PrunedCheckpoint:
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
            f"{path} does not fit this job ({cause(error)}): delete it, and run the command again."
        ) from error


def with_widths(fresh: ModelBundle, widths: Mapping[str, Any] | None) -> ModelBundle:
    """Return a network cut to recorded widths, in place; unchanged if there are none, or it has them already."""
    if widths is None or widths == fresh.architecture.get("widths"):
        return fresh
    architecture = {**fresh.architecture, "widths": dict(widths)}
    return ModelBundle(apply_widths(fresh.model, widths), architecture, fresh.normalize)


def finished_source(folder: JobDir, fresh: Callable[[], ModelBundle], needed_by: str) -> TrainedModel:
    """Return the finished network in `folder`; loading it raises what `load_finished` raises.

    `fresh` builds the unpruned network.

    Raises:
        RunError: If there is none yet; the message names `needed_by`, the command that makes it.
    """
    architecture = finished_record(folder, needed_by)["architecture"]

    def load() -> ModelBundle:
        network = with_widths(fresh(), architecture.get("widths"))
        load_finished(folder, network.model, network.architecture, needed_by)
        return network

    return TrainedModel((folder.result() or {})["identity"], load)
