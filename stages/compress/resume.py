"""Save a pruned network before its fine-tuning, so that a killed job resumes from the same one.

What pruning measures (a latency, on a GPU also a gradient) would differ the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.compress.pruning.blocks import skip_blocks, skipped_paths
from kdpipe.stages.compress.pruning.low_rank import ranks_of, set_ranks
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.distillation.adapters import SHA256, KeptChannels, load_adapters
from kdpipe.stages.errors import ModelError, RunError, cause
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.saved_model import finished_record, load_finished

WIDTHS, REMOVED_BLOCKS, RANKS = "widths", "removed_blocks", "ranks"
CUTS = (REMOVED_BLOCKS, RANKS, WIDTHS)
"""The keys of a recorded architecture that say what pruning removed."""

ADAPTERS = "adapters/"
"""Prefix of the adapters in the file of a pruned network."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished network from which others start.

    Attributes:
        identity: What it is.
        load: A function that loads a new copy.
        folder: The folder of its job, with the adapters of its losses; None for a student trained elsewhere.
    """

    identity: Mapping[str, Any]
    load: Callable[[], ModelBundle]
    folder: JobDir | None = None

    @property
    def adapters(self) -> dict[str, Tensor]:
        """The adapters of its losses; raises what `load_adapters` raises."""
        return {} if self.folder is None else load_adapters(self.folder)

    @property
    def adapters_sha256(self) -> str | None:
        """Their digest; None if there are none."""
        return None if self.folder is None else (self.folder.result() or {}).get(SHA256)


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned network, before or after its fine-tuning.

    Attributes:
        facts: Facts about the pruning, as JSON.
        adapters: The adapters of the losses; before fine-tuning those of the network that was pruned.
        kept: The channels of the losses' layers that were kept of it.
    """

    network: ModelBundle
    facts: Mapping[str, Any]
    adapters: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, KeptChannels] = field(default_factory=dict)


def pruned_path(folder: JobDir) -> Path:
    return folder.path / "start.safetensors"


def save_pruned(path: Path, checkpoint: PrunedCheckpoint) -> None:
    network = checkpoint.network
    tensors = network.model.state_dict() | {ADAPTERS + name: value for name, value in checkpoint.adapters.items()}
    kept = {"kept": {layer: asdict(one) for layer, one in checkpoint.kept.items()}} if checkpoint.kept else {}
    save_tensors(path, tensors, {"architecture": dict(network.architecture), "facts": dict(checkpoint.facts), **kept})


def load_pruned(path: Path, fresh: ModelBundle) -> PrunedCheckpoint:
    """Load a pruned network, fine-tuned or not, into `fresh`, the unpruned network, which is modified.

    Raises:
        RunError: If the file is not of this job, or is damaged.
    """
    tensors, record = load_tensors(path)
    adapters = {name.removeprefix(ADAPTERS): tensors.pop(name) for name in list(tensors) if name.startswith(ADAPTERS)}
    try:
        network = as_pruned(fresh, record["architecture"])
        network.model.load_state_dict(tensors)
        facts = {"channel_ratio": float(record["facts"]["channel_ratio"]), **record["facts"]}
        kept = {
            layer: KeptChannels(int(one["width"]), one["channels"]) for layer, one in record.get("kept", {}).items()
        }
        return PrunedCheckpoint(network, facts, adapters, kept)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
        raise RunError(
            f"{path} does not fit this job ({cause(error)}): delete it, and run the command again."
        ) from error


def as_pruned(fresh: ModelBundle, record: Mapping[str, Any]) -> ModelBundle:
    """Return a network cut as a recorded architecture says, in place; unchanged if it is that already.

    Raises:
        ModelError: The record does not fit the network.
    """
    cuts = {key: record[key] for key in CUTS if record.get(key) is not None}
    if all(cut == fresh.architecture.get(key) for key, cut in cuts.items()):
        return fresh
    model = skip_blocks(fresh.model, cuts[REMOVED_BLOCKS]) if REMOVED_BLOCKS in cuts else fresh.model
    model = set_ranks(model, cuts[RANKS]) if RANKS in cuts else model
    model = apply_widths(model, cuts[WIDTHS]) if WIDTHS in cuts else model
    return ModelBundle(model, {**fresh.architecture, **cuts}, fresh.normalize)


def cuts_of(model: nn.Module, *, widths: bool) -> dict[str, Any]:
    """Return the record of what a pruned network lost: its blocks, ranks of layers, and its layers' `widths`."""
    removed, ranks = skipped_paths(model), ranks_of(model)
    cuts: dict[str, Any] = {REMOVED_BLOCKS: removed} if removed else {}
    return cuts | ({RANKS: ranks} if ranks else {}) | ({WIDTHS: record_widths(model)} if widths else {})


def finished_source(folder: JobDir, fresh: Callable[[], ModelBundle], needed_by: str) -> TrainedModel:
    """Return the finished network in `folder`; loading it raises what `load_finished` raises.

    `fresh` builds the unpruned network.

    Raises:
        RunError: If there is none yet; the message names `needed_by`, the command that makes it.
    """
    architecture = finished_record(folder, needed_by)["architecture"]

    def load() -> ModelBundle:
        network = as_pruned(fresh(), architecture)
        load_finished(folder, network.model, network.architecture, needed_by)
        return network

    return TrainedModel((folder.result() or {})["identity"], load, folder)
