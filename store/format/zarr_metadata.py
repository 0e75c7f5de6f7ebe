"""Zarr v3 metadata of a store: the files that plain Zarr tools read, and their validation."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError, differences, translate_os_errors
from kdpipe.store.format.encodings.head import HEAD, HEAD_KEY, HeadRecord, head_bytes
from kdpipe.store.format.layout import ArraySpec, rows_per_chunk
from kdpipe.store.format.manifest import Manifest, read_manifest
from kdpipe.store.format.samples import CHUNK_ROWS, COLUMNS, Samples, sample_chunks
from kdpipe.store.format.schema import ATTRIBUTE, MARKER_BYTES, MARKERS, METADATA_BYTES, SAMPLES
from kdpipe.store.fs.atomic_write import fsync_path, make_folders, sweep_partial, write_atomically
from kdpipe.store.fs.safe_read import parse_json, read_json

LITTLE_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def metadata_bytes(manifest: Manifest) -> dict[str, bytes]:
    """Return every metadata file of a store by key, in an order in which they can be replaced one by one.

    The group's, which holds the manifest, comes last: arrays may cover more than the manifest.
    """
    groups = {spec.name.rpartition("/")[0] for spec in manifest.arrays} | {SAMPLES}
    groups |= {HEAD.rpartition("/")[0]} if manifest.head else set()
    files = {f"{group}/zarr.json": _group({}) for group in sorted(groups - {""})}
    files |= {f"{spec.name}/zarr.json": _array_metadata(spec, manifest) for spec in manifest.arrays}
    files |= {f"{SAMPLES}/{name}/zarr.json": _column_metadata(name, manifest) for name in COLUMNS}
    files |= {f"{HEAD}/zarr.json": _head_metadata(manifest.head)} if manifest.head else {}
    files[f"{MARKERS}/zarr.json"] = _markers_metadata(manifest)
    files["zarr.json"] = _group({ATTRIBUTE: manifest.to_json()})
    return {key: json.dumps(record, indent=2, allow_nan=False).encode() for key, record in files.items()}


def create_group(path: Path, manifest: Manifest, samples: Samples, head: NDArray[np.float32] | None = None) -> None:
    """Write an empty store into the new folder `path`: samples, the teacher's head if it has one, and metadata."""
    for key, raw in sample_chunks(samples, manifest.layout):
        _write_new(path / key, raw)
    if head is not None:
        _write_new(path / HEAD_KEY, head_bytes(head))
    for key, raw in metadata_bytes(manifest).items():
        _write_new(path / key, raw)
    for entry in [path, *path.rglob("*")]:
        if entry.is_dir():
            fsync_path(entry)


def replace_metadata(path: Path, manifest: Manifest, *, group_first: bool = False) -> None:
    """Replace the metadata of the store at `path` by those of `manifest`, each file atomically, the group's last.

    A store that shrinks needs the group's first: arrays may cover more than the manifest, never less.
    """
    files = list(metadata_bytes(manifest).items())
    for key, raw in reversed(files) if group_first else files:
        file = path / key
        if not file.is_file() or file.read_bytes() != raw:
            make_folders([file.parent])
            sweep_partial(file)
            write_atomically(file, raw)


def read_store_manifest(path: Path) -> Manifest:
    """Read the manifest of the store at `path`, complete or not. Raises StoreError if there is no store."""
    if not path.exists():
        raise StoreError(f"there is no store at {path}: run `kdpipe cache-teacher` on the recipe first.")
    if path.is_file():
        raise StoreError(f"{path} is a file, and a store is a folder: {_unpacking(path)}.")
    if not (path / "zarr.json").exists():
        inside = next(iter(sorted(path.glob("*/zarr.json"))), None) if path.is_dir() else None
        hint = f" Did you mean {inside.parent}?" if inside else ""
        raise StoreError(f"{path} is not a store: it has no zarr.json.{hint}")
    return read_manifest(_read(path / "zarr.json", path).get("attributes"), str(path))


def _unpacking(file: Path) -> str:
    """Return how to make a folder of a file."""
    if zipfile.is_zipfile(file):
        return f"unpack it, `unzip {file} -d FOLDER`, and name the folder"
    if tarfile.is_tarfile(file):
        return f"unpack it, `mkdir FOLDER; tar -xf {file} -C FOLDER`, and name the folder"
    return "name the folder that has zarr.json"


def parse_group(raw: bytes, where: str) -> Manifest:
    """Parse the manifest in a store's `zarr.json`. Raises StoreError where it has none."""
    record = parse_json(raw, f"{where}/zarr.json", METADATA_BYTES, StoreError)
    return read_manifest(record.get("attributes"), where)


def check_arrays(path: Path, manifest: Manifest) -> None:
    """Raise StoreError unless every array's Zarr metadata are those that kdpipe writes.

    An array may be longer than in the manifest: the store is then being extended.
    """
    for spec in manifest.arrays:
        file = path / spec.name / "zarr.json"
        stored, wanted = _read(file, path), _array_metadata(spec, manifest)
        stored["shape"] = _at_most(stored.get("shape"), wanted["shape"])
        found = differences({key: stored.get(key) for key in wanted}, wanted)
        if found:
            key, value, expected = found[0]
            raise StoreError(
                f"{file} does not match the store: {key} is {str(value)[:200]!r}, kdpipe writes {expected!r}. "
                "Run `kdpipe store repair RECIPE`."
            )


def _at_most(shape: Any, wanted: list[int]) -> Any:
    """Cut `shape` to `wanted` along views and samples."""
    if not isinstance(shape, list) or len(shape) != len(wanted) or not all(type(side) is int for side in shape):
        return shape
    return [min(shape[0], wanted[0]), min(shape[1], wanted[1]), *shape[2:]]


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def _array_metadata(spec: ArraySpec, manifest: Manifest) -> dict[str, Any]:
    """Return the zarr.json of an array of targets, which decides its bytes."""
    unit_rows = manifest.layout.unit_rows
    compression = manifest.codec.metadata(spec.little.itemsize) if manifest.codec else []
    sharding = {
        "chunk_shape": [1, rows_per_chunk(spec, unit_rows), *spec.row_shape],
        "codecs": [_bytes_codec(spec.dtype), *compression],
        "index_codecs": [LITTLE_BYTES, {"name": "crc32c"}],
        "index_location": "end",
    }
    axes = range(len(spec.row_shape))
    layer = spec.name.rpartition("/")[2]
    return _array(
        [manifest.layout.num_views, manifest.layout.num_rows, *spec.row_shape],
        spec.dtype,
        [1, unit_rows, *spec.row_shape],
        fill_value="NaN" if spec.dtype.startswith("float") else spec.fill_value,
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        names=["view", "sample", *[f"{layer}_{axis}" if manifest.named_axes else None for axis in axes]],
    )


def _column_metadata(name: str, manifest: Manifest) -> dict[str, Any]:
    dtype, empty = COLUMNS[name]
    codecs = [_bytes_codec(dtype)]
    return _array([manifest.layout.num_rows], dtype, [CHUNK_ROWS], fill_value=empty, codecs=codecs, names=["sample"])


def _head_metadata(head: HeadRecord) -> dict[str, Any]:
    shape = list(head.shape)
    return _array(shape, "float32", shape, fill_value="NaN", codecs=[LITTLE_BYTES], names=["class", "feature"])


def _markers_metadata(manifest: Manifest) -> dict[str, Any]:
    shape = [manifest.layout.num_views, manifest.layout.num_shards, MARKER_BYTES]
    codecs, names = [_bytes_codec("uint8")], ["view", "shard", "byte"]
    return _array(shape, "uint8", [1, 1, MARKER_BYTES], fill_value=0, codecs=codecs, names=names)


def _array(
    shape: list[int], dtype: str, chunk: list[int], *, fill_value: Any, codecs: list[Any], names: list[Any]
) -> dict[str, Any]:
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": names,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _bytes_codec(dtype: str) -> dict[str, Any]:
    """Return the `bytes` codec: single-byte numbers have no byte order."""
    return {"name": "bytes"} if dtype == "uint8" else LITTLE_BYTES


def _write_new(file: Path, raw: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(raw)
    fsync_path(file)


def _read(file: Path, store: Path) -> dict[str, Any]:
    with translate_os_errors(lambda error: f"{file} cannot be read ({error.strerror})."):
        return read_json(file, METADATA_BYTES, StoreError, store)
