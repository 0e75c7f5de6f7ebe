"""Describe a target store: its content, its progress, who is working on it, and the encoding error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.terminal.output import printable
from kdpipe.store import Manifest, holder, read_store_manifest, store_bytes
from kdpipe.store.format.encodings.encoding_error import LARGEST_OF_PROBABILITIES
from kdpipe.store.format.encodings.head import HEAD
from kdpipe.store.format.encodings.logit_encoding import parse_encoding
from kdpipe.store.format.identity import describe_computation
from kdpipe.store.format.manifest import EMBEDDINGS
from kdpipe.store.format.unit_state import store_state

MAX_LISTED = 5
"""Missing units that are printed; the JSON document lists all."""


def model_name(teacher: Mapping[str, Any]) -> str:
    """Return the model of a store's teacher; the manifest may be from an untrusted source."""
    architecture = teacher.get("architecture")
    return str(architecture.get("model")) if isinstance(architecture, Mapping) else "unknown"


def read_store_info(path: Path) -> dict[str, Any]:
    """Return the manifest of the store at `path` with counts of units and bytes; shards are not read."""
    manifest = read_store_manifest(path)
    state, units = store_state(path, manifest), manifest.layout.units()
    return {
        "path": str(path),
        **manifest.to_json(),
        "num_samples": manifest.layout.num_samples,
        "profile": manifest.profile,
        "num_units": state.num_units,
        "num_units_done": state.num_units - len(state.missing),
        "missing_units": [str(unit) for unit in state.missing],
        "at_work": {str(unit): str(worker) for unit in state.missing if (worker := holder(path, unit.key))},
        "being_added": _being_added(manifest),
        "store_bytes": store_bytes(manifest, units),
        "view_bytes": store_bytes(manifest, manifest.layout.units([0])),
        "disk_bytes": state.num_bytes,
    }


def print_store_info(info: dict[str, Any]) -> None:
    """Print the description of a store to stdout."""
    for name, text in _lines(info):
        print(printable(f"{name:<12} {text}"))  # noqa: T201


def _being_added(manifest: Manifest) -> dict[str, Any] | None:
    """Return what the first filling or an extension adds to what readers see; None if all is finished."""
    layout, finished = manifest.layout, manifest.finished
    num_views, num_segments = (finished.num_views, finished.num_segments) if finished else (0, 0)
    finished_arrays = finished.arrays if finished else ()
    added = {
        "num_views": layout.num_views - num_views,
        "num_samples": sum(layout.segments[num_segments:]),
        "arrays": [spec.name for spec in manifest.arrays if spec.name not in finished_arrays],
    }
    return added if any(added.values()) else None


def _operations(views: dict[str, Any]) -> str:
    """Return the names of the operations, or of those of each kind of view."""

    def names(of: dict[str, Any]) -> str:
        return ", ".join(str(operation.get("name")) for operation in of.get("operations", ())) or "none"

    kinds = views.get("kinds")
    return "; ".join(f"{kind.get('name')}: {names(kind)}" for kind in kinds) if kinds else f"operations: {names(views)}"


TASKS = {
    "multilabel": ("labels", "logits of labels that do not exclude each other (sigmoid)"),
    "regression": ("numbers", "numbers (regression)"),
}
"""What the outputs are of, and are, by `data.task`."""


def _lines(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    teacher, data, views = info["teacher"], info["data"], info["views"]
    yield "store", info["path"]
    yield "fingerprint", info["fingerprint"]
    yield "teacher", f"{model_name(teacher)}, weights {str(teacher.get('weights_sha256'))[:16]}"
    what, meaning = TASKS.get(data.get("task"), ("classes", ""))
    classes = f" of {data['num_classes']} {what}" if "num_classes" in data else ""
    yield "data", f"{data.get('name')} {data.get('split', '')}, {info['num_samples']:,} samples{classes}"
    yield "views", f"{info['num_views']} (seed {views.get('seed')}, {_operations(views)})"
    if "head" in info and not any(name.startswith("logits") for name in info["arrays"]):
        yield "logits", f"products of {EMBEDDINGS} and the head, at any temperature"
    elif not any(name.startswith("logits") for name in info["arrays"]):
        yield "output", "embeddings, no logits: for losses on features and relations"
    elif meaning:
        yield "output", meaning
    if encoding := parse_encoding(info):
        yield "logits", encoding.describe()
    yield "profile", info["profile"] + _codec(info)
    for name, spec in info["arrays"].items():
        yield "array", f"{name} {spec['dtype']} {[info['num_views'], info['num_samples'], *spec['row_shape']]}"
    if "head" in info:
        yield "head", f"{HEAD} float32 {info['head']['shape']}"
    yield "units", f"{info['num_units_done']} of {info['num_units']} done, {info['unit_rows']:,} rows each"
    unpacked = " uncompressed" if info["codec"] else ""
    yield "size", f"{info['disk_bytes']:,} bytes on disk; {info['view_bytes']:,} a view{unpacked}"
    yield from _progress(info)
    for name, error in ((info["finished"] or {}).get("fidelity") or {}).items():
        yield "fidelity", f"{name}: {describe_encoding_error(error)}"
    if "compute" in info or "trial" in info:
        yield "computed in", describe_computation(info.get("compute", {}), info.get("trial", {}))
    yield "written by", ", ".join(f"{name} {version}" for name, version in info["versions"].items())


def _codec(info: Mapping[str, Any]) -> str:
    codec = f": {info['codec']['name']}, level {info['codec']['level']}" if info["codec"] else ""
    rounded = ", ".join(f"{name} to {bits} mantissa bits" for name, bits in info["rounded"].items())
    return codec + (f"; rounded: {rounded}" if rounded else "")


def _progress(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    finished, added = info["finished"], info["being_added"]
    if finished:
        num_samples = info["num_samples"] - (added["num_samples"] if added else 0)
        yield "finished", f"{finished['num_views']} views of {num_samples:,} samples, {', '.join(finished['arrays'])}"
    if added:
        counts = [f"{added[name]:,} {name[4:]}" for name in ("num_views", "num_samples") if added[name]]
        yield "being added", ", ".join([*counts, *added["arrays"]])
    for unit, worker in info["at_work"].items():
        yield "at work", f"{unit}: {worker}"
    idle = [unit for unit in info["missing_units"] if unit not in info["at_work"]]
    for unit in idle[:MAX_LISTED]:
        yield "missing", unit
    if len(idle) > MAX_LISTED:
        yield "missing", f"and {len(idle) - MAX_LISTED:,} more units"


def describe_encoding_error(error: Mapping[str, Any]) -> str:
    """Return the encoding error of an array as text."""
    if LARGEST_OF_PROBABILITIES in error:
        figures = [f"probabilities at T = 1, largest error {error[LARGEST_OF_PROBABILITIES]:.3g}"]
    else:
        figures = [f"largest error {error['largest_error']:.3g}"]
    if "kl" in error:
        by_temperature = sorted(error["kl"].items(), key=lambda pair: float(pair[0]))
        kl = ", ".join(f"{nats:.2g} at T={temperature}" for temperature, nats in by_temperature)
        figures = [f"KL {kl}", f"top-1 flips {error['top1_flips']:,} of {error['num_rows']:,}", *figures]
    if "relative_rms" in error:
        figures.append(f"relative rms {error['relative_rms']:.2g}")
    return "; ".join(figures)
