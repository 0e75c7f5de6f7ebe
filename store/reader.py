"""Opening a store and reading it: whole views as slabs, or the rows of a batch through a memory map."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.geometry import ArraySpec, Unit, all_units
from store.manifest import Manifest, require
from store.markers import read_marker
from store.samples import Samples, read_samples
from store.shard import ShardShape, check_index, crc32c, shard_path, shard_shape
from store.zarr_group import check_arrays, read_store_manifest

OPEN_MAPS = 4096
"""Shard maps kept open at a time; Linux allows a process 65,530 maps."""


class TargetStore:
    """A complete store, checked when opened: every unit committed, every shard file of its committed size.

    Made by `open_store`. It holds no open file that a fork or a pickle could share wrongly: maps are opened where
    they are used.
    """

    def __init__(self, path: Path, manifest: Manifest, samples: Samples, files: Mapping[Unit, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.samples = samples
        self._files = files
        self._units = {(unit.view, unit.shard): unit for unit in files}
        self._order = np.argsort(samples.ids, kind="stable")
        self._map = lru_cache(maxsize=OPEN_MAPS)(self._open_map)

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetStore, (self.path, self.manifest, self.samples, self._files)

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    def spec(self, name: str) -> ArraySpec:
        """The array called `name`; StoreError, listing what there is, if there is none."""
        return self.manifest.spec(name)

    def rows_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at which samples stand, by id: int64 [B]. Raises StoreError for ids that the store lacks."""
        sorted_ids = self.samples.ids[self._order]
        at = np.minimum(np.searchsorted(sorted_ids, sample_ids), len(sorted_ids) - 1)
        absent = sample_ids[sorted_ids[at] != sample_ids]
        if len(absent):
            raise StoreError(
                f"{self.path} has no targets for {len(absent)} of the {len(sample_ids)} samples, for example ids "
                f"{absent[:3].tolist()}: cache them, or leave them out of the data set."
            )
        rows: NDArray[np.int64] = self._order[at]
        return rows

    def read_view(self, name: str, view: int) -> NDArray[np.floating]:
        """One view of an array, [N, *row_shape], in memory, every shard checked against its committed crc32c."""
        spec = self.spec(name)
        out = np.empty((self.num_samples, *spec.row_shape), _little(spec))
        for unit in self._units_of(view):
            file = shard_path(self.path, spec, unit)
            raw = file.read_bytes()
            if crc32c(raw) != self._files[unit][name]["crc32c"]:
                raise StoreError(_damaged(self.path, file, unit, "its bytes are not those that were committed"))
            out[unit.start : unit.stop] = _rows(raw, spec, unit)
        return out

    def gather(self, name: str, view: int, rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Rows of one view of an array, [B, *row_shape], through the memory map: only what is touched is read."""
        spec = self.spec(name)
        shards, within = np.divmod(rows, self.manifest.unit_rows)
        present = np.unique(shards)
        if len(present) == 1:
            return self._map(name, view, int(present[0])).take(within, axis=0)
        out = np.empty((len(rows), *spec.row_shape), _little(spec))
        for shard in present:
            here = shards == shard
            out[here] = self._map(name, view, int(shard))[within[here]]
        return out

    def _units_of(self, view: int) -> list[Unit]:
        if not 0 <= view < self.num_views:
            raise StoreError(f"{self.path} has views 0 to {self.num_views - 1}, not {view}.")
        return [unit for unit in self._files if unit.view == view]

    def _open_map(self, name: str, view: int, shard: int) -> NDArray[np.floating]:
        spec, unit = self.spec(name), self._units[view, shard]
        file = shard_path(self.path, spec, unit)
        return np.asarray(np.memmap(file, _little(spec), "r", shape=(unit.num_rows, *spec.row_shape)))


def open_store(path: Path, wanted: Mapping[str, Any] | None = None, advice: str = "") -> TargetStore:
    """Open the complete store at `path`.

    `wanted` names values of its manifest (any of the sections teacher, data, views, arrays, num_views) that it must
    have. Raises FingerprintMismatch with stored and wanted values, pair by pair, where it has others; StoreError
    where there is no store, a unit is missing, or a file is damaged.
    """
    manifest = read_store_manifest(path)
    require(manifest, wanted or {}, f"the store {path}", advice)
    check_arrays(path, manifest)
    files = {}
    for unit in all_units(manifest.num_views, manifest.num_samples, manifest.unit_rows):
        committed = read_marker(path, unit, manifest.identity.fingerprint)
        if committed is None:
            raise StoreError(f"{path} is not complete: {unit} is missing. Run `kdpipe cache-teacher` to finish it.")
        files[unit] = committed
        for spec in manifest.arrays:
            _check_file(path, spec, unit, shard_shape(spec, manifest.unit_rows), committed)
    return TargetStore(path, manifest, read_samples(path, manifest.num_samples, manifest.identity.data), files)


def _check_file(path: Path, spec: ArraySpec, unit: Unit, shape: ShardShape, committed: Mapping[str, Any]) -> None:
    file = shard_path(path, spec, unit)
    try:
        with file.open("rb") as opened:
            opened.seek(shape.data_bytes(unit.num_rows))
            index = opened.read(shape.index_bytes + 1)
    except OSError as error:
        raise StoreError(_damaged(path, file, unit, f"it cannot be read ({error.strerror})")) from error
    expected = shape.file_bytes(unit.num_rows)
    if len(index) != shape.index_bytes or committed.get(spec.name, {}).get("bytes") != expected:
        found = file.stat().st_size
        raise StoreError(_damaged(path, file, unit, f"it has {found:,} bytes, {expected:,} were committed"))
    check_index(index, shape, unit.num_rows, str(file))


def _damaged(path: Path, file: Path, unit: Unit, what: str) -> str:
    return f"{file} ({unit}) is damaged: {what}. Delete that file, and `kdpipe cache-teacher` computes its unit again."


def _rows(raw: bytes, spec: ArraySpec, unit: Unit) -> NDArray[np.floating]:
    rows: NDArray[np.floating] = np.frombuffer(raw[: unit.num_rows * spec.row_bytes], _little(spec))
    return rows.reshape(unit.num_rows, *spec.row_shape)


def _little(spec: ArraySpec) -> np.dtype[np.floating]:
    return np.dtype(spec.dtype).newbyteorder("<")
