"""Checking every byte of a store: metadata, samples, markers and shards, each fault listed by its name.

What covers what: a marker covers its shard files, its own checksum covers the marker, digests in the manifest cover
the samples, the manifest's sha256 covers the manifest, and every metadata file must be, byte for byte, what kdpipe
writes for that manifest. So no flipped bit in any file of a store stays unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import KdpipeError, StoreError, differences
from store.format.layout import ArraySpec, Unit
from store.check.orphans import leftovers
from store.format.manifest import Manifest
from store.format.markers import MARKERS, Marker, marker_key, read_marker
from store.fs.safe_read import read_regular_file
from store.format.samples import CHUNK_ROWS, COLUMNS, SAMPLES, Samples
from store.format.shard import crc32c, decode_shard, shard_key, shard_path, shard_shape
from store.write.writer import exclusive_store
from store.format.zarr_metadata import METADATA_BYTES, metadata_bytes, read_store_manifest

MAX_NAMED = 100
"""Of the chunks of a sample array, so many are named at the most: a foreign manifest may claim any number."""

DIGESTS = {"ids_and_labels_sha256": ("ids", "labels"), "pixels_sha256": ("ids", "pixels_crc32c")}
"""Which sample arrays each digest of the manifest covers."""


@dataclass(frozen=True)
class Fault:
    """One fault: in the file `key` of the store, which is `unit`'s part of `array` where it is any, and what it is."""

    key: str
    what: str
    unit: Unit | None = None
    array: str | None = None

    def to_json(self) -> dict[str, Any]:
        unit = None if self.unit is None else str(self.unit)
        return {"file": self.key, "unit": unit, "array": self.array, "what": self.what}

    def __str__(self) -> str:
        about = ", ".join(str(one) for one in (self.unit, self.array) if one is not None)
        return f"{self.key}{f' ({about})' if about else ''}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_store` found. `damaged`: all faults. `missing`: the units of a filling or an extension that is not
    finished, with the arrays that each lacks. `leftovers`: files that belong to nothing, and do no harm.

    `num_bytes` is what was read and checked; `num_units_whole` counts the units with all arrays, each undamaged.
    """

    damaged: tuple[Fault, ...]
    missing: tuple[tuple[Unit, tuple[str, ...]], ...]
    leftovers: tuple[str, ...]
    num_units: int
    num_units_whole: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "damaged": [fault.to_json() for fault in self.damaged],
            "missing": [{"unit": str(unit), "arrays": list(names)} for unit, names in self.missing],
            "leftovers": list(self.leftovers),
            "num_units": self.num_units,
            "num_units_whole": self.num_units_whole,
            "num_bytes": self.num_bytes,
        }


def verify_store(
    path: Path, on_unit: Callable[[int, int], None] = lambda done, total: None, *, manifest: Manifest | None = None
) -> VerifyReport:
    """Check every file of the store at `path`; the first fault does not end it. One shard is in memory at a time.

    on_unit: called with (units checked, units in all) after each; may raise to stop.
    manifest: what the store should be, where that is known from elsewhere because its own cannot be read.

    Without a manifest nothing else can be checked, and that is the one fault then. Raises StoreError where there is
    no store at all, or another job changed it while it was checked.
    """
    with _settled(path):
        if manifest is None:
            try:
                manifest = read_store_manifest(path)
            except StoreError as error:
                if not (path / MARKERS).is_dir():
                    raise
                return VerifyReport((Fault("zarr.json", f"nothing else can be checked: {error}"),), (), (), 0, 0, 0)
        check = _Verifier(path, manifest)
        check.metadata()
        check.samples()
    units = manifest.layout.units()
    for done, unit in enumerate(units, 1):
        check.unit(unit)
        on_unit(done, len(units))
    if check.damaged:
        _require_unchanged(path, manifest)
    flawed = {fault.unit for fault in check.damaged if fault.unit} | {unit for unit, _ in check.missing}
    return VerifyReport(
        damaged=tuple(check.damaged),
        missing=tuple(check.missing),
        leftovers=leftovers(path, manifest),
        num_units=len(units),
        num_units_whole=len(units) - len(flawed),
        num_bytes=check.num_bytes,
    )


@contextmanager
def _settled(path: Path) -> Iterator[None]:
    """Let nobody change metadata meanwhile; on a read-only disk, where no lock can be taken, nobody does."""
    with ExitStack() as held:
        if path.is_dir() and ((path / "zarr.json").exists() or (path / MARKERS).exists()):  # any other is no store
            with suppress(KdpipeError):
                held.enter_context(exclusive_store(path))
        yield


def _require_unchanged(path: Path, manifest: Manifest) -> None:
    """Faults in a store that is made smaller meanwhile are none."""
    with suppress(StoreError):  # a manifest that cannot be read is a fault, and noted
        if read_store_manifest(path).layout != manifest.layout:
            raise KdpipeError(f"{path} was extended or made smaller while it was checked: run the same command again.")


@dataclass
class _Verifier:
    """One check of a store under way."""

    path: Path
    manifest: Manifest
    damaged: list[Fault] = field(default_factory=list)
    missing: list[tuple[Unit, tuple[str, ...]]] = field(default_factory=list)
    num_bytes: int = 0

    def metadata(self) -> None:
        """Every metadata file must have the very bytes that kdpipe writes."""
        for key, wanted in metadata_bytes(self.manifest).items():
            held = self._read(key, METADATA_BYTES)
            if held is not None and held != wanted:
                self.damaged.append(Fault(key, _unlike(held, wanted)))

    def samples(self) -> None:
        """The samples must have the manifest's digests, and rows that hold no sample must be empty."""
        columns = {name: column for name in COLUMNS if (column := self._column(name)) is not None}
        if not columns:
            return
        rows = self.manifest.layout.sample_rows()
        held = {name: column[rows].astype(COLUMNS[name][0]) for name, column in columns.items()}
        nothing = np.zeros(len(rows), np.int64)
        digests = Samples(**{name: held.get(name, nothing) for name in COLUMNS}).digests()
        for digest, covered in DIGESTS.items():
            there = all(name in held for name in covered)
            if there and digests[digest] != self.manifest.identity.data.get(digest):
                what = f"{' or '.join(covered)} are not those that the manifest was written for ({digest})"
                self.damaged.append(Fault(SAMPLES, what))
        for name, column in columns.items():
            column[rows] = COLUMNS[name][1]
            for chunk in np.unique(np.flatnonzero(column != COLUMNS[name][1]) // CHUNK_ROWS):
                what = "rows that hold no sample are not empty: damaged, or an extension was cut short"
                self.damaged.append(Fault(f"{SAMPLES}/{name}/c/{chunk}", what))

    def unit(self, unit: Unit) -> None:
        """A unit's marker, and each shard file that it lists, or must list."""
        try:
            marker = read_marker(self.path, self.manifest, unit)
        except StoreError as error:
            self.damaged.append(Fault(marker_key(unit), str(error), unit))
            return
        needed = self._needed(unit)
        if marker is None and needed:
            what = "it is gone, and with it the word that its unit was finished"
            self.damaged.append(Fault(marker_key(unit), what, unit))
            return
        self.num_bytes += self._size(marker_key(unit)) if marker else 0
        marker = marker or Marker({})
        for spec in self.manifest.arrays:
            if spec.name in marker.files:
                file = marker.files[spec.name]
                fault = self._shard_fault(spec, unit, file["bytes"], file["crc32c"])
            else:
                fault = "its unit's marker does not list it, and it was finished" if spec.name in needed else None
            if fault is not None:
                self.damaged.append(Fault(shard_key(spec, unit), fault, unit, spec.name))
        lacking = tuple(spec.name for spec in self.manifest.arrays if spec.name not in {*marker.files, *needed})
        if lacking:
            self.missing.append((unit, lacking))

    def _needed(self, unit: Unit) -> tuple[str, ...]:
        """The arrays that a unit must have, because readers see them."""
        finished = self.manifest.finished
        if finished is None or unit.view >= finished.num_views:
            return ()
        return finished.arrays if self.manifest.layout.segment_of(unit.shard) < finished.num_segments else ()

    def _shard_fault(self, spec: ArraySpec, unit: Unit, num_bytes: int, checksum: int) -> str | None:
        """What is wrong with a shard file that was committed with so many bytes and this crc32c; None if nothing."""
        file, codec = shard_path(self.path, spec, unit), self.manifest.codec
        shape = shard_shape(spec, self.manifest.layout.unit_rows)
        unpacked = shape.file_bytes(unit.num_rows)
        # Packing makes nothing twice as large: a foreign marker must not choose how much memory is taken.
        if num_bytes > 2 * unpacked if codec else num_bytes != unpacked:
            return f"its marker says that it has {num_bytes:,} bytes, its rows take {unpacked:,}"
        try:
            raw = read_regular_file(file, num_bytes, self.path)
        except OSError as error:
            return _unreadable(error)
        self.num_bytes += len(raw)
        if len(raw) != num_bytes:
            return f"it has {file.stat().st_size:,} bytes, {num_bytes:,} were committed"
        if crc32c(raw) != checksum:
            return "its bytes are not those that were committed (crc32c)"
        try:
            decode_shard(raw, shape, unit.num_rows, codec, "the shard")
        except StoreError as error:
            return str(error)
        return None

    def _column(self, name: str) -> NDArray[Any] | None:
        """All rows of a sample array, empty ones included; None where a chunk is not there, which is noted."""
        dtype = np.dtype(COLUMNS[name][0]).newbyteorder("<")
        chunk_bytes, parts, num_bad = CHUNK_ROWS * dtype.itemsize, [], 0
        for chunk in range(-(-self.manifest.layout.num_rows // CHUNK_ROWS)):
            key = f"{SAMPLES}/{name}/c/{chunk}"
            raw = self._read(key, chunk_bytes)
            if raw is not None and len(raw) != chunk_bytes:
                self.damaged.append(Fault(key, f"it has {self._size(key):,} bytes instead of {chunk_bytes:,}"))
                raw = None
            num_bad += raw is None
            if num_bad > MAX_NAMED:
                break
            parts.append(raw or b"")
        return None if num_bad else np.frombuffer(bytearray().join(parts), dtype)

    def _read(self, key: str, max_bytes: int) -> bytes | None:
        try:
            raw = read_regular_file(self.path / key, max_bytes, self.path)
        except OSError as error:
            self.damaged.append(Fault(key, _unreadable(error)))
            return None
        self.num_bytes += len(raw)
        return raw

    def _size(self, key: str) -> int:
        return (self.path / key).stat().st_size


def _unreadable(error: OSError) -> str:
    return "it is gone" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"


def _unlike(held: bytes, wanted: bytes) -> str:
    """How a metadata file differs from the one that belongs there."""
    try:
        found = differences(json.loads(held), json.loads(wanted))
    except (ValueError, RecursionError):
        return "it is no JSON any more"
    if not found:
        return "it is not spelled as kdpipe writes it"
    key, stored, expected = found[0]
    perhaps = (
        ", or a command that extends or shrinks the store was cut short: run it again" if key[:5] == "shape" else ""
    )
    return f"{key} is {str(stored)[:100]!r}, kdpipe writes {str(expected)[:100]!r}{perhaps}"
