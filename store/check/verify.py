"""Verify every byte of a store: metadata, samples, markers and shards.

A marker covers its shard files, its own checksum covers the marker, digests in the manifest cover the samples, the
manifest's sha256 covers the manifest, and every metadata file must be, byte for byte, the one that kdpipe writes for
that manifest. So a flipped bit in any file of a store is found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import KdpipeError, LinkedStoreError, StoreError, differences
from kdpipe.store.format.encodings.head import HEAD_KEY, NOT_RECORDED, is_recorded
from kdpipe.store.format.layout import ArraySpec, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import Marker, marker_key, read_marker
from kdpipe.store.format.samples import CHUNK_ROWS, COLUMNS, Samples, read_column
from kdpipe.store.format.schema import MARKERS, METADATA_BYTES, SAMPLES
from kdpipe.store.format.shard import decode_shard, is_committed, shard_key, shard_path, shard_shape
from kdpipe.store.format.zarr_metadata import metadata_bytes, read_store_manifest
from kdpipe.store.fs.safe_read import read_regular_file
from kdpipe.store.write.claims import exclusive_store

DIGESTS = {"ids_and_labels_sha256": ("ids", "labels"), "pixels_sha256": ("ids", "pixels_crc32c")}
"""By digest of the manifest, the sample arrays that it covers."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        key: The file, as a key of the store.
        what: What is wrong.
        unit: The unit that the file belongs to, if any.
        array: The array that the file belongs to, if any.
    """

    key: str
    what: str
    unit: Unit | None = None
    array: str | None = None

    def to_json(self) -> dict[str, Any]:
        unit = None if self.unit is None else str(self.unit)
        return {"file": self.key, "unit": unit, "array": self.array, "what": self.what}

    def __str__(self) -> str:
        about = ", ".join(str(part) for part in (self.unit, self.array) if part is not None)
        return f"{self.key}{f' ({about})' if about else ''}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify_store`.

    Attributes:
        damaged: All faults.
        missing: Units of an unfinished filling or extension, with the arrays that each lacks.
        num_units_whole: Units with all arrays, each undamaged.
        num_bytes: Bytes read and checked.
    """

    damaged: tuple[Fault, ...]
    missing: tuple[tuple[Unit, tuple[str, ...]], ...]
    num_units: int
    num_units_whole: int
    num_bytes: int

    @property
    def ok(self) -> bool:
        """Whether the store is complete and undamaged."""
        return not self.damaged and not self.missing

    def to_json(self) -> dict[str, Any]:
        return {
            "damaged": [fault.to_json() for fault in self.damaged],
            "missing": [{"unit": str(unit), "arrays": list(names)} for unit, names in self.missing],
            "num_units": self.num_units,
            "num_units_whole": self.num_units_whole,
            "num_bytes": self.num_bytes,
        }


def verify_store(
    path: Path, on_unit: Callable[[int, int], None] = lambda done, total: None, *, manifest: Manifest | None = None
) -> VerifyReport:
    """Verify every file of the store at `path` and collect all faults. One shard is in memory at a time.

    Args:
        path: The store.
        on_unit: Called with (units checked, units in all) after each; may raise to stop.
        manifest: The expected manifest, if known from elsewhere because the stored one cannot be read. Without one,
            an unreadable manifest is the only fault reported.

    Raises:
        StoreError: There is no store at all, or it is one of links.
        KdpipeError: Another job changed it meanwhile.
    """
    with _metadata_locked(path):
        if manifest is None:
            try:
                manifest = read_store_manifest(path)
            except LinkedStoreError:
                raise
            except StoreError as error:
                if not (path / MARKERS).is_dir():
                    raise
                return VerifyReport((Fault("zarr.json", f"nothing else can be checked: {error}"),), (), 0, 0, 0)
        verifier = _Verifier(path, manifest)
        verifier.metadata()
        verifier.samples()
        verifier.head()
    units = manifest.layout.units()
    for done, unit in enumerate(units, 1):
        verifier.unit(unit)
        on_unit(done, len(units))
    if verifier.faults:
        _require_unchanged(path, manifest)
    incomplete = {fault.unit for fault in verifier.faults if fault.unit} | {unit for unit, _ in verifier.missing}
    return VerifyReport(
        damaged=tuple(verifier.faults),
        missing=tuple(verifier.missing),
        num_units=len(units),
        num_units_whole=len(units) - len(incomplete),
        num_bytes=verifier.num_bytes,
    )


@contextmanager
def _metadata_locked(path: Path) -> Iterator[None]:
    """Prevent changes of metadata meanwhile; on a read-only disk, where no lock can be taken, there are none."""
    is_store = path.is_dir() and any((path / name).exists() for name in ("zarr.json", MARKERS))
    with ExitStack() as stack:
        if is_store:
            with suppress(KdpipeError):
                stack.enter_context(exclusive_store(path))
        yield


def _require_unchanged(path: Path, manifest: Manifest) -> None:
    """Raise KdpipeError if the store was extended or shrunk meanwhile: the faults found may then be wrong."""
    with suppress(StoreError):  # an unreadable manifest is a fault, recorded already
        if read_store_manifest(path).layout != manifest.layout:
            raise KdpipeError(f"{path} was extended or shrunk while it was checked: run the same command again.")


@dataclass
class _Verifier:
    """State of one verification."""

    path: Path
    manifest: Manifest
    faults: list[Fault] = field(default_factory=list)
    missing: list[tuple[Unit, tuple[str, ...]]] = field(default_factory=list)
    num_bytes: int = 0

    def metadata(self) -> None:
        """Check that every metadata file has exactly the bytes that kdpipe writes."""
        for key, wanted in metadata_bytes(self.manifest).items():
            stored = self._read(key, METADATA_BYTES)
            if stored is not None and stored != wanted:
                self.faults.append(Fault(key, _difference(stored, wanted)))

    def samples(self) -> None:
        """Check the samples against the manifest's digests, and that rows without a sample are empty."""
        columns = {name: column for name in COLUMNS if (column := self._column(name)) is not None}
        if not columns:
            return
        rows = self.manifest.layout.sample_rows()
        stored = {name: column[rows].astype(COLUMNS[name][0]) for name, column in columns.items()}
        zeros = np.zeros(len(rows), np.int64)
        digests = Samples(**{name: stored.get(name, zeros) for name in COLUMNS}).digests()
        for digest, covered in DIGESTS.items():
            readable = all(name in stored for name in covered)
            if readable and digests[digest] != self.manifest.identity.data.get(digest):
                what = f"{' or '.join(covered)} do not match the manifest ({digest})"
                self.faults.append(Fault(SAMPLES, what))
        for name, column in columns.items():
            column[rows] = COLUMNS[name][1]
            for chunk in np.unique(np.flatnonzero(column != COLUMNS[name][1]) // CHUNK_ROWS):
                what = "rows without a sample are not empty: damaged, or an extension was interrupted"
                self.faults.append(Fault(f"{SAMPLES}/{name}/c/{chunk}", what))

    def head(self) -> None:
        """Check the teacher's head against its digest in the manifest."""
        record = self.manifest.head
        raw = None if record is None else self._read(HEAD_KEY, record.num_bytes)
        if record is not None and raw is not None and not is_recorded(raw, record):
            self.faults.append(Fault(HEAD_KEY, NOT_RECORDED))

    def unit(self, unit: Unit) -> None:
        """Check a unit's marker, and each shard file that it lists or must list."""
        try:
            marker = read_marker(self.path, self.manifest, unit)
        except LinkedStoreError:
            raise
        except StoreError as error:
            self.faults.append(Fault(marker_key(unit), str(error), unit))
            return
        needed = self._needed(unit)
        if marker is None and needed:
            what = "it is missing, though its unit was finished"
            self.faults.append(Fault(marker_key(unit), what, unit))
            return
        self.num_bytes += self._size(marker_key(unit)) if marker else 0
        marker = marker or Marker({})
        for spec in self.manifest.arrays:
            if spec.name in marker.files:
                fault = self._shard_fault(spec, unit, marker.files[spec.name])
            else:
                fault = "its unit's marker does not list it, though it was finished" if spec.name in needed else None
            if fault is not None:
                self.faults.append(Fault(shard_key(spec, unit), fault, unit, spec.name))
        lacking = tuple(spec.name for spec in self.manifest.arrays if spec.name not in {*marker.files, *needed})
        if lacking:
            self.missing.append((unit, lacking))

    def _needed(self, unit: Unit) -> tuple[str, ...]:
        """Return the arrays that a unit must have, because readers see them."""
        finished = self.manifest.finished
        if finished is None or unit.view >= finished.num_views:
            return ()
        return finished.arrays if self.manifest.layout.segment_of(unit.shard) < finished.num_segments else ()

    def _shard_fault(self, spec: ArraySpec, unit: Unit, entry: Mapping[str, int]) -> str | None:
        """Return the fault of a shard file with this entry in its marker; None if there is none."""
        file, codec, num_bytes = shard_path(self.path, spec, unit), self.manifest.codec, entry["bytes"]
        shape = shard_shape(spec, self.manifest.layout.unit_rows)
        if not shape.may_have(num_bytes, unit.num_rows, codec):
            return f"its marker states {num_bytes:,} bytes, its rows take {shape.file_bytes(unit.num_rows):,}"
        try:
            raw = read_regular_file(file, num_bytes, self.path)
        except OSError as error:
            return _unreadable(error)
        self.num_bytes += len(raw)
        if len(raw) != num_bytes:
            return f"it has {file.stat().st_size:,} bytes, {num_bytes:,} were committed"
        if not is_committed(raw, entry):
            return "its bytes are not those that were committed (crc32c)"
        try:
            decode_shard(raw, shape, unit.num_rows, codec, "the shard")
        except StoreError as error:
            return str(error)
        return None

    def _column(self, name: str) -> NDArray[Any] | None:
        """Return all rows of a sample array, empty ones included; None, with the fault recorded, where it is bad."""
        try:
            return read_column(self._read_chunk, name, self.manifest.layout, str(self.path))
        except LinkedStoreError:
            raise
        except StoreError as error:
            self.faults.append(Fault(f"{SAMPLES}/{name}", str(error)))
            return None

    def _read_chunk(self, key: str, max_bytes: int) -> bytes | None:
        try:
            raw = read_regular_file(self.path / key, max_bytes, self.path)
        except OSError:
            return None
        self.num_bytes += len(raw)
        return raw

    def _read(self, key: str, max_bytes: int) -> bytes | None:
        try:
            raw = read_regular_file(self.path / key, max_bytes, self.path)
        except OSError as error:
            self.faults.append(Fault(key, _unreadable(error)))
            return None
        self.num_bytes += len(raw)
        return raw

    def _size(self, key: str) -> int:
        return (self.path / key).stat().st_size


def _unreadable(error: OSError) -> str:
    return "it is missing" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"


def _difference(stored: bytes, wanted: bytes) -> str:
    """Return how a metadata file differs from the expected one."""
    try:
        found = differences(json.loads(stored), json.loads(wanted))
    except (ValueError, RecursionError):
        return "it is not valid JSON"
    if not found:
        return "it is not formatted as kdpipe writes it"
    key, value, expected = found[0]
    changing = ", or a command that extends or shrinks the store was interrupted: run it again"
    hint = changing if key[:5] == "shape" else ""
    return f"{key} is {str(value)[:100]!r}, kdpipe writes {str(expected)[:100]!r}{hint}"
