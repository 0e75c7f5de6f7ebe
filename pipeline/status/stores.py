"""Determine the status of a target store from its manifest and markers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.status.files import Budget, Measure, measure, text
from kdpipe.store.errors import KdpipeError
from kdpipe.store.format.schema import ATTRIBUTE, MARKERS, SAMPLES, SCHEMA_VERSION
from kdpipe.store.fs.checksums import read_intact_json


@dataclass(frozen=True)
class StoreStatus:
    """Status of a target store.

    Attributes:
        state: finished, being filled, unfinished, damaged, or another schema (of another version of kdpipe).
        at_work: Units being computed, with the process.
        last_active: Time of the last activity, in seconds since 1970.
    """

    path: str
    state: str
    last_active: float
    disk_bytes: int
    teacher: str = "unknown"
    data: str = ""
    num_views: int = 0
    num_samples: int = 0
    num_units: int = 0
    num_units_done: int = 0
    at_work: tuple[str, ...] = ()


def manifest_of(folder: Path, names: set[str]) -> dict[str, Any] | None:
    """Return the unchecked manifest of the store in `folder`: None if it is no kdpipe store, {} if it is damaged."""
    if "zarr.json" not in names:
        return None
    group = read_intact_json(folder / "zarr.json")
    attributes = group.get("attributes") if group else None
    manifest = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if isinstance(manifest, dict):
        return manifest
    return {} if {MARKERS, SAMPLES} <= names else None


def store_status(folder: Path, manifest: Mapping[str, Any], budget: Budget) -> StoreStatus:
    """Return the status of the store in `folder`, whose unchecked manifest is `manifest`."""
    from kdpipe.pipeline.commands.store.info import model_name, read_store_info  # imports numpy

    size = measure(folder, budget, Measure())
    common: dict[str, Any] = {"path": str(folder), "last_active": size.newest, "disk_bytes": size.num_bytes}
    try:
        info = read_store_info(folder)
    except (KdpipeError, OSError):
        is_ours = manifest.get("schema_version") in (SCHEMA_VERSION, None)
        return StoreStatus(state="damaged" if is_ours else "another schema", **common)
    is_finished = info["num_units_done"] == info["num_units"] and not info["being_added"]
    return StoreStatus(
        state="finished" if is_finished else "being filled" if info["at_work"] else "unfinished",
        teacher=text(model_name(info["teacher"])),
        data=text(info["data"].get("name")),
        num_views=info["num_views"],
        num_samples=info["num_samples"],
        num_units=info["num_units"],
        num_units_done=info["num_units_done"],
        at_work=tuple(f"{unit}: {text(worker)}" for unit, worker in info["at_work"].items()),
        **common,
    )
