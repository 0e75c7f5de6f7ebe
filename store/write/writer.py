"""Create a store and fill it unit by unit, so that a kill at any moment leaves only whole units."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError, explain, translate_os_errors
from kdpipe.store.format.encodings.encoding_error import all_finite, merge, summarize_features, summarize_logits
from kdpipe.store.format.encodings.head import require_head
from kdpipe.store.format.layout import ArraySpec, Unit
from kdpipe.store.format.manifest import Finished, Manifest
from kdpipe.store.format.markers import Marker, marker_path, write_marker
from kdpipe.store.format.samples import Samples
from kdpipe.store.format.schema import MARKER_BYTES
from kdpipe.store.format.shard import crc32c, encode_shard, shard_path, shard_shape
from kdpipe.store.format.unit_state import committed, missing_arrays
from kdpipe.store.format.zarr_metadata import create_group, read_store_manifest, replace_metadata
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX, fsync_path, make_folders, sweep_partial, write_atomically
from kdpipe.store.write.acceptance import require_readable, require_samples
from kdpipe.store.write.claims import exclusive_store


def create_store(path: Path, manifest: Manifest, samples: Samples, head: NDArray[np.float32] | None = None) -> None:
    """Create an empty store at `path`, metadata, samples and the teacher's head if it has one, atomically.

    Raises StoreError, and writes nothing, where readers would refuse it.
    """
    require_readable(manifest, f"the store {path}")
    require_samples(manifest, samples, f"the store {path}")
    require_head(head, manifest.head, f"the store {path}")
    with write_errors(path):
        make_folders([path.parent])
        sweep_partial(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
        try:
            create_group(temporary, manifest, samples, head)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(path.parent)


def write_unit(
    path: Path,
    manifest: Manifest,
    unit: Unit,
    rows: Mapping[str, NDArray[Any]],
    fidelity: Mapping[str, Any] | None = None,
) -> int:
    """Write and commit one unit, claimed by the caller; arrays that it committed before are kept.

    Args:
        rows: Rows [n, *row_shape] of every array that the unit still lacks.
        fidelity: By array, the error of its encoding.

    Returns:
        The number of bytes written.

    Raises:
        StoreError: Rows have the wrong shape or are not finite, or writing fails. The unit is then not committed.
    """
    lacking = set(missing_arrays(path, manifest, unit)) - set(rows)
    if lacking:
        raise StoreError(f"{unit} of {path} still lacks {', '.join(sorted(lacking))}: it cannot be committed.")
    written = {}
    for name, values in rows.items():
        spec = manifest.spec(name)
        _check_rows(spec, unit, values)
        parts = encode_shard(values, shard_shape(spec, manifest.layout.unit_rows), manifest.codec)
        _write(path, shard_path(path, spec, unit), parts)
        written[name] = {"bytes": sum(len(part) for part in parts), "crc32c": crc32c(*parts)}
    before = committed(path, manifest, unit)
    marker = Marker({**before.files, **written}, {**before.fidelity, **(fidelity or {})})
    target = marker_path(path, unit)
    with write_errors(target, MARKER_BYTES):
        _make_folder(path, target.parent)
        write_marker(path, manifest, unit, marker)
    return sum(file["bytes"] for file in written.values())


def sweep_unit(path: Path, manifest: Manifest, unit: Unit) -> None:
    """Remove the temporary files of a killed writer of `unit`. Only the holder of the unit's claim may."""
    for spec in manifest.arrays:
        sweep_partial(shard_path(path, spec, unit))
    sweep_partial(marker_path(path, unit))


def finish_store(path: Path) -> bool:
    """Make the first filling, or an extension, visible to readers if no unit is missing. Returns whether it did."""
    with exclusive_store(path), write_errors(path):
        manifest = read_store_manifest(path)
        layout, markers = manifest.layout, []
        for unit in layout.units():
            if missing_arrays(path, manifest, unit):
                return False
            markers.append(committed(path, manifest, unit))
        measured = dict.fromkeys(name for marker in markers for name in marker.fidelity)
        fidelity = {name: _total_encoding_error(path, name, markers) for name in measured}
        names = tuple(spec.name for spec in manifest.arrays)
        finished = Finished(layout.num_views, len(layout.segments), names, fidelity)
        if manifest.finished == finished:
            return False
        replace_metadata(path, replace(manifest, finished=finished))
    return True


def _total_encoding_error(path: Path, name: str, markers: Iterable[Marker]) -> dict[str, Any]:
    """Summarize the loss of an array's encoding over all units."""
    try:
        totals = merge([marker.fidelity[name] for marker in markers if name in marker.fidelity])
        return summarize_logits(totals) if "kl" in totals else summarize_features(totals)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"{path} has a marker whose figures on {name} are damaged ({error}).") from error


def _check_rows(spec: ArraySpec, unit: Unit, rows: NDArray[Any]) -> None:
    if rows.shape != (unit.num_rows, *spec.row_shape) or rows.dtype != np.dtype(spec.dtype):
        raise StoreError(
            f"{spec.name} of {unit} is {rows.dtype}{list(rows.shape)}, "
            f"the store has {spec.dtype}{[unit.num_rows, *spec.row_shape]}."
        )
    if not all_finite(rows):
        raise StoreError(f"{spec.name} of {unit} has NaN or infinity, which a store never holds.")


def _write(store: Path, target: Path, parts: list[bytes | memoryview]) -> None:
    with write_errors(target, sum(len(part) for part in parts)):
        _make_folder(store, target.parent)
        write_atomically(target, *parts)


def _make_folder(store: Path, folder: Path) -> None:
    """Create a folder in the store. Refuses if the store is gone: an unmounted one would be recreated on the disk."""
    if not (store / "zarr.json").exists():
        raise FileNotFoundError(errno.ENOENT, "the store is gone; was its file system unmounted?", str(store))
    make_folders([folder])


def write_errors(target: Path, num_bytes: int | None = None) -> AbstractContextManager[None]:
    """Translate an OSError in writing `num_bytes` to `target` into a StoreError."""

    def message(error: OSError) -> str:
        reason, advice = explain(error)
        folder = next((parent for parent in target.parents if parent.exists()), Path("/"))
        free = shutil.disk_usage(folder).free
        room = (
            f"{free:,} bytes are free"
            if num_bytes is None
            else f"{num_bytes:,} bytes are needed there and {free:,} are free"
        )
        return (
            f"cannot write {target}: {reason}; {room}. What is committed is safe: {advice}, and run the same command "
            "again."
        )

    return translate_os_errors(message)
