"""A finished store that is read key by key, wherever it lies: in a bucket, on a web server, or packed on this machine.

Nothing of it is believed. The size of each file is bounded before it is asked for, and its bytes are taken once they
have the crc32c that its unit's marker committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.format.layout import StoreLayout, Unit
from store.format.identity import Identity
from store.format.manifest import ATTRIBUTE, Finished, Manifest, read_manifest
from store.format.markers import MARKER_BYTES, Marker, marker_key, parse_marker
from store.fs.safe_read import read_regular_file
from store.remote.object_store import is_url, open_remote
from store.format.samples import ReadKey, Samples, samples_from
from store.format.shard import ShardShape, crc32c, decode_shard, shard_key, shard_shape
from store.format.zarr_metadata import METADATA_BYTES, parse_group, read_store_manifest


@dataclass(frozen=True)
class RemoteStore:
    """A store to be read key by key. `where` is for people; `finished` is the part of it that counts."""

    where: str
    read: ReadKey
    manifest: Manifest
    finished: Finished

    @property
    def segments(self) -> tuple[int, ...]:
        """The samples of each finished segment."""
        return self.manifest.layout.segments[: self.finished.num_segments]

    @property
    def segment_fingerprints(self) -> tuple[str, ...]:
        """What the store was called when each of these segments was its last."""
        return self.manifest.segment_fingerprints[: self.finished.num_segments]


def open_remote_store(where: str | Path) -> RemoteStore:
    """The store at a URL or in a folder. One file is read: its manifest.

    Raises StoreError where there is no store, it cannot be reached, or nothing of it is finished.
    """
    if is_url(where):
        remote = open_remote(str(where))
        raw = remote.read("zarr.json", METADATA_BYTES)
        if raw is None:
            raise StoreError(f"there is no store at {remote.url}: it has no zarr.json. Check the address.")
        return _source(remote.url, remote.read, parse_group(raw, remote.url))
    path = Path(where)
    return _source(str(path), partial(_read_local, path), read_store_manifest(path))


def _source(where: str, read: ReadKey, manifest: Manifest) -> RemoteStore:
    if manifest.finished is None:
        raise StoreError(f"{where} is not complete: run `kdpipe cache-teacher` where it is made, to finish it first.")
    return RemoteStore(where, read, manifest, manifest.finished)


def _read_local(folder: Path, key: str, max_bytes: int) -> bytes | None:
    try:
        raw = read_regular_file(folder / key, max_bytes, folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{folder / key} cannot be read ({error.strerror}).") from error
    if len(raw) > max_bytes:
        raise StoreError(f"{folder / key} is damaged: it has more than the {max_bytes:,} bytes that belong to it.")
    return raw


def read_remote_samples(source: RemoteStore) -> Samples:
    """The samples of the finished segments, in the order of their rows. Raises StoreError where they are damaged."""
    layout, data = source.manifest.layout, source.manifest.identity.data
    samples = samples_from(source.read, layout, data, source.where)
    return samples.take(np.arange(sum(source.segments)))


def unpacked_manifest(source: RemoteStore, samples: Samples, num_segments: int) -> Manifest:
    """The manifest of a zero-copy store that holds what the source has finished of its first `num_segments` segments.

    Raises StoreError where the fingerprints of the source are not those of its samples.
    """
    manifest, finished = source.manifest, source.finished
    unpacked = replace(
        manifest,
        identity=_identity_at(source, samples, num_segments),
        arrays=tuple(spec for spec in manifest.arrays if spec.name in finished.arrays),
        layout=StoreLayout(finished.num_views, manifest.layout.unit_rows, source.segments[:num_segments]),
        previous_fingerprints=source.segment_fingerprints[: num_segments - 1],
        codec=None,
        finished=None,
    )
    return read_manifest({ATTRIBUTE: unpacked.to_json()}, source.where)


def _identity_at(source: RemoteStore, samples: Samples, num_segments: int) -> Identity:
    """Whose outputs the store had when it had so many segments: it must have been called by that one's fingerprint."""
    identity = source.manifest.identity
    if num_segments < len(source.manifest.layout.segments):
        num_samples = sum(source.segments[:num_segments])
        digests = samples.take(np.arange(num_samples)).digests()
        identity = replace(identity, data={**identity.data, **digests, "num_samples": num_samples})
    if identity.fingerprint != source.segment_fingerprints[num_segments - 1]:
        raise StoreError(
            f"{source.where} has a damaged manifest: the fingerprint of segment {num_segments - 1} is not that of its "
            "samples. Cache it again."
        )
    return identity


def read_remote_unit(
    source: RemoteStore, unit: Unit, names: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The rows of a unit in some arrays, by name [n, *row_shape], and what their encoding lost.

    Raises StoreError, naming the file, where one is missing or is not the one that was committed.
    """
    marker = _read_marker(source, unit)
    fidelity = {name: figures for name, figures in marker.fidelity.items() if name in source.finished.fidelity}
    return {name: _read_rows(source, unit, name, marker.files) for name in names}, fidelity


def _read_marker(source: RemoteStore, unit: Unit) -> Marker:
    key = marker_key(unit)
    raw = source.read(key, MARKER_BYTES)
    if raw is None:
        raise _damaged(source, key, unit, "it is missing, though the store calls it finished")
    return parse_marker(raw, source.manifest, unit, f"{source.where}/{key}")


def _read_rows(source: RemoteStore, unit: Unit, name: str, files: Mapping[str, Mapping[str, int]]) -> NDArray[Any]:
    spec, codec = source.manifest.spec(name), source.manifest.codec
    key, committed = shard_key(spec, unit), files.get(name)
    shape = shard_shape(spec, source.manifest.layout.unit_rows)
    unpacked_bytes = shape.file_bytes(unit.num_rows)
    if committed is None:
        raise _damaged(source, marker_key(unit), unit, f"it lacks {name}, though the store calls it finished")
    fits = committed["bytes"] <= _most_packed_bytes(shape, unit) if codec else committed["bytes"] == unpacked_bytes
    if not fits:
        raise _damaged(source, key, unit, f"its {committed['bytes']:,} bytes cannot hold {unpacked_bytes:,}")
    raw = source.read(key, committed["bytes"])
    if raw is None:
        raise _damaged(source, key, unit, "it is missing, though it was committed")
    if len(raw) != committed["bytes"] or crc32c(raw) != committed["crc32c"]:
        raise _damaged(source, key, unit, "its bytes are not those that were committed")
    return decode_shard(raw, shape, unit.num_rows, codec, f"{source.where}/{key}")


def _most_packed_bytes(shape: ShardShape, unit: Unit) -> int:
    """More than Zstd or Blosc ever make of a shard: what does not shrink grows by n/256 and a header a chunk."""
    spare = shape.chunk_bytes // 128 + 1024
    return shape.file_bytes(unit.num_rows) + shape.num_present(unit.num_rows) * spare


def _damaged(source: RemoteStore, key: str, unit: Unit, what: str) -> StoreError:
    return StoreError(
        f"{source.where}/{key} ({unit}) is damaged: {what}. Run `kdpipe store repair RECIPE` where the store is made, "
        "upload it again, and run the same command: what is staged already is kept."
    )
