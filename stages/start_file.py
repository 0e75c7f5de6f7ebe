"""A network as a compression left it, before its fine-tuning: kept, so that a killed job starts from the same one.

What was measured on the way (a latency, on a GPU also a gradient) would come out otherwise the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.compression.widths import apply_widths
from stages.job_folder import JobFolder
from stages.model_file import save_model
from stages.network import Network
from stages.tensor_file import load_tensors


@dataclass(frozen=True)
class Start:
    """A network that is about to be fine-tuned, and what is known of how it came about, as JSON."""

    network: Network
    facts: Mapping[str, Any]


def start_path(folder: JobFolder) -> Path:
    return folder.path / "start.safetensors"


def save_start(folder: JobFolder, start: Start) -> None:
    """Keep it, whole or not at all."""
    record = {"architecture": dict(start.network.architecture), "facts": dict(start.facts)}
    save_model(start_path(folder), start.network.model, record)


def load_start(folder: JobFolder, fresh: Network) -> Start:
    """The one that was kept; `fresh` is the unpruned network, built anew, and is used up. Raises ModelError for a
    damaged file.
    """
    tensors, record = load_tensors(start_path(folder))
    network = with_widths(fresh, record["architecture"].get("widths"))
    network.model.load_state_dict(tensors)
    return Start(network, record["facts"])


def with_widths(fresh: Network, widths: Mapping[str, Any] | None) -> Network:
    """A network, used up, cut to recorded widths; as it is where there are none, or where it has them already."""
    if widths is None or widths == fresh.architecture.get("widths"):
        return fresh
    architecture = {**fresh.architecture, "widths": dict(widths)}
    return Network(apply_widths(fresh.model, widths), architecture, fresh.normalise)
