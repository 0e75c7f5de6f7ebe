"""A finished store that is read key by key: in a bucket, on a web server, or compressed on this machine.

It is untrusted: the size of each file is bounded before it is requested, and its bytes are accepted only with the
crc32c that its unit's marker committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.head import HEAD_KEY, parse_head
from kdpipe.store.format.layout import StoreLayout, Unit
from kdpipe.store.format.manifest import Finished, Manifest, read_manifest
from kdpipe.store.format.markers import Marker, marker_key, parse_marker
from kdpipe.store.format.samples import ReadKey, Samples, samples_from
from kdpipe.store.format.schema import ATTRIBUTE, MARKER_BYTES, METADATA_BYTES
from kdpipe.store.format.shard import decode_shard, is_committed, shard_key, shard_shape
from kdpipe.store.format.zarr_metadata import parse_group, read_store_manifest
from kdpipe.store.fs.safe_read import read_regular_file
from kdpipe.store.remote.object_store import is_url, open_remote


@dataclass(frozen=True)
class RemoteStore:
    """A store that is read key by key.

    Attributes:
        where: Its address in messages.
        finished: The part of it that is read.
    """

    where: str
    read: ReadKey
    manifest: Manifest
    finished: Finished

    @property
    def segments(self) -> tuple[int, ...]:
        """Number of samples of each finished segment."""
        return self.manifest.layout.segments[: self.finished.num_segments]

    @property
    def segment_fingerprints(self) -> tuple[str, ...]:
        """Fingerprint of the store when each finished segment was its last."""
        return self.manifest.segment_fingerprints[: self.finished.num_segments]


def open_remote_store(where: str | Path, check: Callable[[], None] = lambda: None) -> RemoteStore:
    """Open the store at a URL or in a folder. Only its manifest is read.

    `check` is called while a server is waited for, and may raise, to stop.

    Raises StoreError where there is no store, it cannot be reached, or nothing of it is finished.
    """
    if is_url(where):
        remote = open_remote(str(where), check)
        raw = remote.read("zarr.json", METADATA_BYTES)
        if raw is None:
            raise StoreError(f"there is no store at {remote.url}: it has no zarr.json. Check the address.")
        return _finished_store(remote.url, remote.read, parse_group(raw, remote.url))
    path = Path(where)
    return _finished_store(str(path), partial(_read_local, path), read_store_manifest(path))


def _finished_store(where: str, read: ReadKey, manifest: Manifest) -> RemoteStore:
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
        raise StoreError(f"{folder / key} is damaged: it has more than {max_bytes:,} bytes.")
    return raw


def read_remote_samples(remote: RemoteStore) -> Samples:
    """Read the samples of the finished segments, in the order of their rows. Raises StoreError if damaged."""
    samples = samples_from(remote.read, remote.manifest.layout, remote.manifest.identity.data, remote.where)
    return samples.take(np.arange(sum(remote.segments)))


def read_remote_head(remote: RemoteStore) -> NDArray[np.float32] | None:
    """Read the teacher's head [C, D + 1]; None if the store has none. Raises StoreError if damaged."""
    record = remote.manifest.head
    return None if record is None else parse_head(remote.read(HEAD_KEY, record.num_bytes), record, remote.where)


def unpacked_manifest(remote: RemoteStore, samples: Samples) -> Manifest:
    """Return the manifest of a zero-copy store of what is finished.

    Raises StoreError where the remote store's fingerprints are not those of its samples.
    """
    manifest, finished = remote.manifest, remote.finished
    for count in range(1, finished.num_segments + 1):
        first = samples.take(np.arange(sum(remote.segments[:count])))
        identity = manifest.identity_of(count, first, remote.where)
    unpacked = replace(
        manifest,
        identity=identity,
        arrays=tuple(spec for spec in manifest.arrays if spec.name in finished.arrays),
        layout=StoreLayout(finished.num_views, manifest.layout.unit_rows, remote.segments),
        previous_fingerprints=remote.segment_fingerprints[:-1],
        codec=None,
        finished=None,
    )
    return read_manifest({ATTRIBUTE: unpacked.to_json()}, remote.where)


def read_remote_unit(
    remote: RemoteStore, unit: Unit, names: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read the rows of a unit in some arrays, by name [n, *row_shape], and the loss of their encoding.

    Raises StoreError, naming the file, where one is missing or is not the one that was committed.
    """
    marker = _read_marker(remote, unit)
    fidelity = {name: figures for name, figures in marker.fidelity.items() if name in remote.finished.fidelity}
    return {name: _read_rows(remote, unit, name, marker.files) for name in names}, fidelity


def _read_marker(remote: RemoteStore, unit: Unit) -> Marker:
    key = marker_key(unit)
    raw = remote.read(key, MARKER_BYTES)
    if raw is None:
        raise _damaged(remote, key, unit, "it is missing, though its unit was finished")
    return parse_marker(raw, remote.manifest, unit, f"{remote.where}/{key}")


def _read_rows(remote: RemoteStore, unit: Unit, name: str, files: Mapping[str, Mapping[str, int]]) -> NDArray[Any]:
    spec, codec = remote.manifest.spec(name), remote.manifest.codec
    key, entry = shard_key(spec, unit), files.get(name)
    shape = shard_shape(spec, remote.manifest.layout.unit_rows)
    if entry is None:
        raise _damaged(remote, marker_key(unit), unit, f"it lacks {name}, though its unit was finished")
    if not shape.may_have(entry["bytes"], unit.num_rows, codec):
        unpacked = shape.file_bytes(unit.num_rows)
        raise _damaged(remote, key, unit, f"its {entry['bytes']:,} bytes cannot hold {unpacked:,}")
    raw = remote.read(key, entry["bytes"])
    if raw is None:
        raise _damaged(remote, key, unit, "it is missing, though it was committed")
    if not is_committed(raw, entry):
        raise _damaged(remote, key, unit, "its bytes are not those that were committed")
    return decode_shard(raw, shape, unit.num_rows, codec, f"{remote.where}/{key}")


def _damaged(remote: RemoteStore, key: str, unit: Unit, what: str) -> StoreError:
    return StoreError(
        f"{remote.where}/{key} ({unit}) is damaged: {what}. Run `kdpipe store repair RECIPE` where the store is made, "
        "upload it again, and run the same command: what is already staged is kept."
    )
