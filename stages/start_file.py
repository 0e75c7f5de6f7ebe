"""A network as a compression left it, before its fine-tuning: kept, so that a killed job starts from the same one.

What was measured on the way (a latency, on a GPU also a gradient) would come out otherwise the second time.
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
class Start:
    """A network that is about to be fine-tuned, and what is known of how it came about, as JSON."""

    network: Network
    facts: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What stands in the header of its file."""
        return {"architecture": dict(self.network.architecture), "facts": dict(self.facts)}


def start_path(folder: JobFolder) -> Path:
    return folder.path / "start.safetensors"


def save_start(path: Path, start: Start) -> None:
    """Keep it, whole or not at all."""
    save_model(path, start.network.model, start.record)


def load_start(path: Path, fresh: Network) -> Start:
    """The one that was kept, or that a fine-tuning made of it; `fresh` is the unpruned network, built anew, and is used
    up. Raises RunError for a file that is something else.
    """
    tensors, record = load_tensors(path)
    try:
        network = with_widths(fresh, record["architecture"].get("widths"))
        network.model.load_state_dict(tensors)
        return Start(network, {"channel_ratio": float(record["facts"]["channel_ratio"]), **record["facts"]})
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
        raise RunError(f"{path} is not of this job, or damaged ({cause(error)}): delete it, and run again.") from error


def with_widths(fresh: Network, widths: Mapping[str, Any] | None) -> Network:
    """A network, used up, cut to recorded widths; as it is where there are none, or where it has them already."""
    if widths is None or widths == fresh.architecture.get("widths"):
        return fresh
    architecture = {**fresh.architecture, "widths": dict(widths)}
    return Network(apply_widths(fresh.model, widths), architecture, fresh.normalise)
