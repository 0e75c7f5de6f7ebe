"""`kdpipe store info`: what a store says it is, how far it is filled, who is at work on it, and what storing lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.terminal.output import printable
from store import Manifest, StoreError, Unit, holder, missing_arrays, read_store_manifest, store_bytes
from store.markers import Marker, read_marker

MOST_NAMED = 5
"""So many missing units are named to people; the JSON document has all."""


@dataclass(frozen=True)
class Filled:
    """How far a store is filled: the units that lack something, and the bytes of the shards that are committed."""

    num_units: int
    missing: tuple[Unit, ...]
    num_bytes: int


def how_filled(path: Path, manifest: Manifest) -> Filled:
    """Look at the marker and the shards of every unit; nothing is read of the shards."""
    missing, num_bytes, units = [], 0, manifest.geometry.units()
    for unit in units:
        lacking = missing_arrays(path, manifest, unit)
        if lacking:
            missing.append(unit)
        files = _committed(path, manifest, unit).files
        num_bytes += sum(file["bytes"] for name, file in files.items() if name not in lacking)
    return Filled(len(units), tuple(missing), num_bytes)


def model_name(teacher: Mapping[str, Any]) -> str:
    """What a store's teacher is called. A stranger's store may say anything, or nothing."""
    architecture = teacher.get("architecture")
    return str(architecture.get("model")) if isinstance(architecture, Mapping) else "unknown"


def read_store_info(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, with its units counted and its bytes added up. Raises StoreError if there
    is no store.
    """
    manifest = read_store_manifest(path)
    filled, units = how_filled(path, manifest), manifest.geometry.units()
    at_work = {str(unit): str(at_it) for unit in filled.missing if (at_it := holder(path, unit.key))}
    return {
        "path": str(path),
        **manifest.to_json(),
        "num_samples": manifest.geometry.num_samples,
        "profile": manifest.profile,
        "num_units": filled.num_units,
        "num_units_done": filled.num_units - len(filled.missing),
        "missing_units": [str(unit) for unit in filled.missing],
        "at_work": at_work,
        "being_added": _being_added(manifest),
        "store_bytes": store_bytes(manifest, units),
        "view_bytes": store_bytes(manifest, manifest.geometry.units([0])),
        "disk_bytes": filled.num_bytes,
    }


def print_store_info(info: dict[str, Any]) -> None:
    """The same for people, on stdout."""
    for name, text in _lines(info):
        print(printable(f"{name:<12} {text}"))  # noqa: T201


def _committed(path: Path, manifest: Manifest, unit: Unit) -> Marker:
    try:
        return read_marker(path, manifest, unit) or Marker({})
    except StoreError:
        return Marker({})


def _being_added(manifest: Manifest) -> dict[str, Any] | None:
    """What an extension under way, or the first filling, adds to what readers see; None where all is finished."""
    geometry, finished = manifest.geometry, manifest.finished
    num_views, num_segments = (finished.num_views, finished.num_segments) if finished else (0, 0)
    there = finished.arrays if finished else ()
    added = {
        "num_views": geometry.num_views - num_views,
        "num_samples": sum(geometry.segments[num_segments:]),
        "arrays": [spec.name for spec in manifest.arrays if spec.name not in there],
    }
    return added if any(added.values()) else None


def _lines(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    teacher, data, views = info["teacher"], info["data"], info["views"]
    operations = ", ".join(name for operation in views.get("operations", ()) for name in operation) or "none"
    top_k = info["top_k"]
    yield "store", info["path"]
    yield "fingerprint", info["fingerprint"]
    yield "teacher", f"{model_name(teacher)}, weights {str(teacher.get('weights_sha256'))[:16]}"
    classes = f" of {data['num_classes']} classes" if "num_classes" in data else ""
    yield "data", f"{data.get('name')} {data.get('split', '')}, {info['num_samples']:,} samples{classes}"
    yield "views", f"{info['num_views']} (seed {views.get('seed')}, operations: {operations})"
    if top_k:
        grid = top_k["temperatures"]
        yield "logits", f"the {top_k['k']} largest of {top_k['num_classes']}, for T from {grid[0]:g} to {grid[-1]:g}"
    yield "profile", info["profile"] + _packing(info)
    for name, spec in info["arrays"].items():
        yield "array", f"{name} {spec['dtype']} {[info['num_views'], info['num_samples'], *spec['row_shape']]}"
    yield "units", f"{info['num_units_done']} of {info['num_units']} done, {info['unit_rows']:,} rows each"
    unpacked = " unpacked" if info["codec"] else ""
    yield "size", f"{info['disk_bytes']:,} bytes on disk; {info['view_bytes']:,} a view{unpacked}"
    yield from _progress(info)
    for name, lost in ((info["finished"] or {}).get("fidelity") or {}).items():
        yield "fidelity", f"{name}: {describe_loss(lost)}"
    yield "written by", ", ".join(f"{name} {version}" for name, version in info["versions"].items())


def _packing(info: Mapping[str, Any]) -> str:
    codec = f": {info['codec']['name']}, level {info['codec']['level']}" if info["codec"] else ""
    rounded = ", ".join(f"{name} to {bits} mantissa bits" for name, bits in info["rounded"].items())
    return codec + (f"; rounded: {rounded}" if rounded else "")


def _progress(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    finished, added = info["finished"], info["being_added"]
    if finished:
        num_samples = info["num_samples"] - (added["num_samples"] if added else 0)
        yield "finished", f"{finished['num_views']} views of {num_samples:,} samples, {', '.join(finished['arrays'])}"
    if added:
        what = [f"{added[name]:,} {name[4:]}" for name in ("num_views", "num_samples") if added[name]]
        yield "being added", ", ".join([*what, *added["arrays"]])
    for unit, at_it in info["at_work"].items():
        yield "at work", f"{unit}: {at_it}"
    idle = [unit for unit in info["missing_units"] if unit not in info["at_work"]]
    for unit in idle[:MOST_NAMED]:
        yield "missing", unit
    if len(idle) > MOST_NAMED:
        yield "missing", f"and {len(idle) - MOST_NAMED:,} more units"


def describe_loss(lost: Mapping[str, Any]) -> str:
    """What an array's encoding lost, in a few words."""
    figures = [f"largest error {lost['largest_error']:.3g}"]
    if "kl" in lost:
        by_temperature = sorted(lost["kl"].items(), key=lambda pair: float(pair[0]))
        kl = ", ".join(f"{nats:.2g} at T={temperature}" for temperature, nats in by_temperature)
        figures = [f"KL {kl}", f"top-1 flips {lost['top1_flips']:,} of {lost['num_rows']:,}", *figures]
    if "relative_rms" in lost:
        figures.append(f"relative rms {lost['relative_rms']:.2g}")
    return "; ".join(figures)
