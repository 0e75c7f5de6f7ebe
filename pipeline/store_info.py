"""`kdpipe store info`: what a store says it is, and how far it is filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store import missing_units, read_store_manifest, store_bytes


def read_store_info(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, with its units counted and its bytes added up."""
    manifest = read_store_manifest(path)
    units = manifest.geometry.units()
    missing = missing_units(path, manifest)
    return {
        "path": str(path),
        **manifest.to_json(),
        "num_units": len(units),
        "num_units_done": len(units) - len(missing),
        "missing_units": [str(unit) for unit in missing],
        "store_bytes": store_bytes(manifest, units),
    }


def print_store_info(info: dict[str, Any]) -> None:
    """The same for people, on stdout."""
    teacher, data, views = info["teacher"], info["data"], info["views"]
    operations = ", ".join(name for operation in views["operations"] for name in operation) or "none"
    lines = {
        "store": info["path"],
        "fingerprint": info["fingerprint"],
        "teacher": f"{teacher['architecture']['model']}, weights {teacher['weights_sha256'][:16]}",
        "data": f"{data['name']} {data['split']}, {data['num_samples']:,} samples of {data['num_classes']} classes",
        "views": f"{info['num_views']} (seed {views['seed']}, operations: {operations})",
        "units": f"{info['num_units_done']} of {info['num_units']} done, {info['unit_rows']:,} rows each",
        "size": f"{info['store_bytes']:,} bytes when complete",
        "written by": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    }
    for name, text in lines.items():
        print(f"{name:<12} {text}")  # noqa: T201
    for name, spec in info["arrays"].items():
        shape = [info["num_views"], data["num_samples"], *spec["row_shape"]]
        print(f"{'array':<12} {name} {spec['dtype']} {shape}")  # noqa: T201
    for unit in info["missing_units"][:5]:
        print(f"{'missing':<12} {unit}")  # noqa: T201
