"""Read a store: rows of a batch by sample id, or whole units and views checked against their checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.head import head_logits, read_head
from kdpipe.store.format.encodings.quantized_maps import decode_features, is_quantized, quantized_specs
from kdpipe.store.format.layout import ArraySpec, StoreLayout, Unit
from kdpipe.store.format.manifest import EMBEDDINGS, Finished, Manifest
from kdpipe.store.format.markers import Marker
from kdpipe.store.format.samples import Samples
from kdpipe.store.format.shard import decode_shard, is_committed, shard_path, shard_shape
from kdpipe.store.format.unit_state import missing_units
from kdpipe.store.fs.safe_read import read_regular_file
from kdpipe.store.read.mapped_views import NOT_COMMITTED, MappedViews, Verify, damaged
from kdpipe.store.read.rows import CACHE_BYTES, RowIndex, UnitCache

UNMAPPED = "shard by shard, "


@dataclass(frozen=True)
class ReadMode:
    """Access to an array's rows: `mode` is "mapped" or "memory", `reason` says why."""

    mode: str
    reason: str


class TargetStore:
    """The finished part of a store: every unit committed, every shard of its committed size. Made by `open_store`.

    It holds no open file. Address ranges are mapped on first use, survive a fork, and are dropped when the store is
    pickled for a spawned worker, which maps its own.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        samples: Samples,
        markers: Mapping[Unit, Marker],
        *,
        stream_bytes: int | None = None,
        verify: Verify = "first",
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.samples = samples
        self._markers = markers
        self._finished = finished_part(path, manifest)
        self._layout = visible_layout(manifest.layout, self._finished)
        self._index = RowIndex(samples.ids, self._layout.sample_rows(), self._layout.num_shards * self.unit_rows)
        self._stream_bytes = stream_bytes
        self._mapped = MappedViews(path, manifest, self._layout, markers, verify)
        self._cache = UnitCache(self.read_unit, CACHE_BYTES if stream_bytes is None else stream_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        made = partial(TargetStore, stream_bytes=self._stream_bytes, verify=self._mapped.verify)
        return made, (self.path, self.manifest, self.samples, self._markers)

    def __repr__(self) -> str:
        return f"TargetStore({str(self.path)!r}: {self.num_views} views of {self.num_samples:,} samples)"

    @property
    def num_views(self) -> int:
        return self._layout.num_views

    @property
    def num_samples(self) -> int:
        return self._layout.num_samples

    @property
    def num_rows(self) -> int:
        """Rows of a view: samples, and the rows left empty where an extension began. N of `array`."""
        return self._layout.num_rows

    @property
    def unit_rows(self) -> int:
        """Rows of a full unit: row r is in shard r // unit_rows."""
        return self._layout.unit_rows

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Arrays that are finished."""
        return tuple(spec for spec in self.manifest.arrays if spec.name in self._finished.arrays)

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules of the teacher with a stored feature map or statistic."""
        names = [spec.name for spec in self.arrays if not spec.name.startswith("logits")]
        return tuple(dict.fromkeys(name.partition("/")[2] for name in names))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty where the data set has none."""
        return tuple(self.manifest.identity.data.get("classes", ()))

    @property
    def num_classes(self) -> int:
        """Number of logits of the teacher, whatever their encoding; 0 if it has embeddings."""
        encoding, head = self.manifest.encoding, self.manifest.head
        if not self.manifest.has_logits:
            return 0
        if head is not None:
            return head.shape[0]
        return encoding.num_classes if encoding else self.manifest.spec("logits").row_shape[0]

    @cached_property
    def head(self) -> NDArray[np.float32] | None:
        """The teacher's last linear layer, [C, D + 1], its biases in the last column; None if it is not stored.

        Raises StoreError where it is damaged.
        """
        return None if self.manifest.head is None else read_head(self.path, self.manifest.head)

    @property
    def provenance(self) -> dict[str, Any]:
        """Teacher, data set, views, fingerprint and library versions."""
        identity = self.manifest.identity
        return {**identity.to_json(), "fingerprint": identity.fingerprint, "versions": dict(self.manifest.versions)}

    @property
    def fidelity(self) -> Mapping[str, Any]:
        """By array, the loss of its encoding, measured when it was written."""
        return self._finished.fidelity

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape [V, N, *row_shape] of an array, rows without a sample included."""
        return (self.num_views, self.num_rows, *self.spec(name).row_shape)

    def spec(self, name: str) -> ArraySpec:
        """Return the array `name`. Raises StoreError, listing the arrays, if there is none or it is not finished."""
        spec = self.manifest.spec(name)
        if name not in self._finished.arrays:
            raise StoreError(f"{self.path}: {name} is still being added. Run `kdpipe cache-teacher` to finish it.")
        return spec

    def rows_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of samples by id: int64 [B]. Raises StoreError for ids that the store lacks."""
        rows = self._index.find(sample_ids)
        absent = self._index.absent(sample_ids, rows)
        if len(absent):
            raise StoreError(
                f"{self.path} has no targets for {len(absent)} of the {len(sample_ids)} samples, for example ids "
                f"{absent[:3].tolist()}: cache them, or leave them out of the data set."
            )
        return rows

    def gather(self, name: str, view: int, sample_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the rows of samples by id in one view of an array: [B, *row_shape], in the order of the ids.

        Raises StoreError for ids, views and arrays that the store lacks.
        """
        try:
            # As fast as np.memmap's take: the row of an absent sample is out of range, which `take` checks anyway.
            rows: NDArray[Any] = self._mapped.ready[name, view].take(self._index.find(sample_ids), axis=0)
        except (KeyError, IndexError):  # not mapped (yet), or an absent id
            return self.take(name, view, self.rows_of(sample_ids))
        return rows

    def logits(self, view: int, sample_ids: NDArray[np.int64], temperature: float = 1.0) -> NDArray[np.float32]:
        """Return the logits of samples by id in one view, [B, num_classes], decoded for a softmax at a temperature.

        Raises StoreError where the encoding does not cover the temperature.
        """
        encoding = self.manifest.encoding
        if self.head is not None and self.manifest.logits_from_head:
            return head_logits(self.gather(EMBEDDINGS, view, sample_ids), self.head)
        if encoding is None:
            return self.gather("logits", view, sample_ids).astype(np.float32)
        names = [spec.name for spec in self.arrays if spec.name.startswith("logits/")]
        return encoding.decode({name: self.gather(name, view, sample_ids) for name in names}, temperature)

    def features(self, name: str, view: int, sample_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the features of samples by id in one view, [B, ...], like `gather`, but decoded from 8 bits."""
        names = [one.name for one in (quantized_specs(self.spec(name)) if is_quantized(self.spec(name)) else ())]
        return decode_features({one: self.gather(one, view, sample_ids) for one in names or [name]}, name)

    def take(self, name: str, view: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows of one view of an array, as numbered by `rows_of`: [B, *row_shape]."""
        if (name, view) in self._mapped.ready or self.read_mode(name).mode == "mapped":
            self._check_view(view)
            return self._mapped.view(name, view).take(rows, axis=0)
        return self._take_by_unit(self.spec(name), view, rows)

    def read_mode(self, name: str) -> ReadMode:
        """Return how `take` reads an array, and why."""
        self.spec(name)
        if self._stream_bytes is not None:
            return ReadMode("memory", f"{UNMAPPED}because it is streamed within {self._stream_bytes:,} bytes")
        if why_not := self._mapped.why_not(name):
            return ReadMode("memory", f"{UNMAPPED}because {why_not}")
        return ReadMode("mapped", "one address range over all of its shards")

    def array(self, name: str) -> NDArray[Any]:
        """Return all views of an array as one mapped, read-only ndarray [V, N, *row_shape].

        Its shards are checked first, unless the store is one of `verifying("never")`. Rows without a sample have
        undefined values. Raises StoreError if the array cannot be mapped.
        """
        reading = self.read_mode(name)
        if reading.mode != "mapped":
            why_not = reading.reason.removeprefix(UNMAPPED)
            raise StoreError(f"{self.path}: {name} cannot be mapped, {why_not}. Use read_view.")
        return self._mapped.whole(name)

    def verifying(self, verify: Verify) -> TargetStore:
        """Return the same store, with another rule for when the shards of mapped arrays are checked.

        "first" checks the shards of a view when this process first reads the view; "always" when it first reads the
        view and whenever it comes back to it from another view, as each epoch does; "never" leaves it to `kdpipe store
        verify`.
        """
        return self if verify == self._mapped.verify else self._with(self._stream_bytes, verify)

    def streamed(self, max_bytes: int) -> TargetStore:
        """Return the same store, read shard by shard into memory instead of mapped.

        It caches up to `max_bytes` of shards (at least one), and one more while that is read. Each shard is checked
        against its committed crc32c.
        """
        return self._with(max_bytes, self._mapped.verify)

    def _with(self, stream_bytes: int | None, verify: Verify) -> TargetStore:
        read = self.path, self.manifest, self.samples, self._markers
        return TargetStore(*read, stream_bytes=stream_bytes, verify=verify)

    def units(self, view: int) -> list[Unit]:
        """Return the units of a view, in the order of their rows."""
        self._check_view(view)
        return self._layout.units([view])

    def read_unit(self, name: str, unit: Unit) -> NDArray[Any]:
        """Read the rows of a unit, [n, *row_shape], into memory, checked against the committed crc32c.

        Raises StoreError, naming the file, where it is damaged.
        """
        spec = self.spec(name)
        file, entry = shard_path(self.path, spec, unit), self._markers[unit].files[name]
        try:
            raw = read_regular_file(file, entry["bytes"], self.path)
        except OSError as error:
            raise StoreError(damaged(file, unit, f"it cannot be read ({error.strerror})")) from error
        if not is_committed(raw, entry):
            raise StoreError(damaged(file, unit, NOT_COMMITTED))
        return decode_shard(raw, shard_shape(spec, self.unit_rows), unit.num_rows, self.manifest.codec, str(file))

    def read_view(self, name: str, view: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one view of an array, [N, *row_shape], into memory (into `out` if given), every shard checked.

        Rows without a sample, before an extension, have the array's fill value. One shard at a time is in memory beside
        the result.
        """
        spec = self.spec(name)
        if out is None:
            out = np.empty((self.num_rows, *spec.row_shape), spec.little)
        filled = 0
        for unit in self.units(view):
            out[filled : unit.start] = spec.fill_value
            out[unit.start : unit.stop] = self.read_unit(name, unit)
            filled = unit.stop
        return out

    def _take_by_unit(self, spec: ArraySpec, view: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(rows), *spec.row_shape), spec.little)
        shards, units = rows // self.unit_rows, self.units(view)
        for shard in np.unique(shards):
            in_shard = shards == shard
            out[in_shard] = self._cache.rows(spec.name, units[shard])[rows[in_shard] - units[shard].start]
        return out

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            total = self.manifest.layout.num_views
            growing = f" It is being extended to {total}: run `kdpipe cache-teacher` to finish." if view < total else ""
            raise StoreError(f"{self.path} has views 0 to {self.num_views - 1}, not {view}.{growing}")


def finished_part(path: Path, manifest: Manifest) -> Finished:
    """Return the finished part of a store. Raises StoreError if there is none."""
    if manifest.finished is not None:
        return manifest.finished
    missing = missing_units(path, manifest)
    what = f"{missing[0]} is missing" if missing else "it was not finished"
    raise StoreError(f"{path} is not complete: {what}. Run `kdpipe cache-teacher` to finish it.")


def visible_layout(layout: StoreLayout, finished: Finished) -> StoreLayout:
    """Return the layout of what is finished. Shards keep their numbers: segments and views are only appended."""
    return StoreLayout(finished.num_views, layout.unit_rows, layout.segments[: finished.num_segments])
