"""A store as a Zarr v3 group: what zarr-python is asked to create, and what must stand in its metadata to be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BytesCodec

from store.errors import StoreError, differences
from store.geometry import ArraySpec, rows_per_chunk
from store.manifest import ATTRIBUTE, Manifest, read_manifest
from store.markers import MARKERS, marker_bytes
from store.samples import Samples, write_samples

LITTLE_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def create_group(path: Path, manifest: Manifest, samples: Samples) -> None:
    """Write the metadata of an empty store, and its samples, at `path`."""
    group = zarr.create_group(path, zarr_format=3, attributes={ATTRIBUTE: manifest.to_json()})
    for spec in manifest.arrays:
        _create_array(group, spec, manifest)
    write_samples(group, samples)
    size = marker_bytes(manifest.arrays)
    group.create_array(
        MARKERS,
        shape=(manifest.num_views, -(-manifest.num_samples // manifest.unit_rows), size),
        chunks=(1, 1, size),
        dtype="uint8",
        fill_value=0,
        compressors=None,
        dimension_names=["view", "shard", "byte"],
    )


def read_store_manifest(path: Path) -> Manifest:
    """What the store at `path` says it is, complete or not. Raises StoreError if there is no store."""
    if not path.exists():
        raise StoreError(f"there is no store at {path}: run `kdpipe cache-teacher` on the recipe first.")
    if not (path / "zarr.json").exists():
        inside = next(iter(sorted(path.glob("*/zarr.json"))), None)
        hint = f" Did you mean {inside.parent}?" if inside else ""
        raise StoreError(f"{path} is no store: it has no zarr.json.{hint}")
    return read_manifest(_read_json(path / "zarr.json").get("attributes", {}), str(path))


def check_arrays(path: Path, manifest: Manifest) -> None:
    """Raise StoreError unless every array's Zarr metadata says what kdpipe writes: plain Zarr must read our numbers."""
    for spec in manifest.arrays:
        file = path / spec.name / "zarr.json"
        held = _read_json(file)
        wanted = _array_metadata(spec, manifest)
        found = differences({key: held.get(key) for key in wanted}, wanted)
        if found:
            key, stored, expected = found[0]
            raise StoreError(f"{file} does not fit the store: {key} is {stored!r}, kdpipe writes {expected!r}.")


def _create_array(group: zarr.Group, spec: ArraySpec, manifest: Manifest) -> None:
    names: list[Any] = ["view", "sample", *[None] * len(spec.row_shape)]
    group.create_array(
        spec.name,
        shape=(manifest.num_views, manifest.num_samples, *spec.row_shape),
        chunks=(1, rows_per_chunk(spec, manifest.unit_rows), *spec.row_shape),
        shards=(1, manifest.unit_rows, *spec.row_shape),
        dtype=spec.dtype,
        fill_value=float("nan"),
        filters=None,
        compressors=None,
        serializer=BytesCodec(endian="little"),
        dimension_names=names,
    )


def _array_metadata(spec: ArraySpec, manifest: Manifest) -> dict[str, Any]:
    """What decides the bytes of an array, as its zarr.json has it."""
    inner = [1, rows_per_chunk(spec, manifest.unit_rows), *spec.row_shape]
    sharding = {
        "chunk_shape": inner,
        "codecs": [LITTLE_BYTES],
        "index_codecs": [LITTLE_BYTES, {"name": "crc32c"}],
        "index_location": "end",
    }
    grid = {"chunk_shape": [1, manifest.unit_rows, *spec.row_shape]}
    return {
        "shape": [manifest.num_views, manifest.num_samples, *spec.row_shape],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file} is not the metadata of a Zarr v3 node: {error}.") from error
    if not isinstance(record, dict):
        raise StoreError(f"{file} is not the metadata of a Zarr v3 node: it is no JSON object.")
    return record
