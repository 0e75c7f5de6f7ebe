"""Find orphaned files inside a store: of killed writers, of dropped views, or foreign."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kdpipe.store.format.layout import Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import marker_key
from kdpipe.store.format.samples import CHUNK_ROWS, COLUMNS
from kdpipe.store.format.schema import SAMPLES
from kdpipe.store.format.shard import shard_key
from kdpipe.store.format.zarr_metadata import metadata_bytes


def orphaned_files(path: Path, manifest: Manifest) -> tuple[str, ...]:
    """Return the keys of all files of the store at `path` that are no part of it, in order."""
    metadata = set(metadata_bytes(manifest))
    return tuple(key for key in _files(path) if key not in metadata and not _is_chunk(key, manifest))


def _files(path: Path) -> Iterator[str]:
    """Yield the keys of all files; links to folders are listed, not followed."""
    for folder, inner, names in os.walk(path):
        inner.sort()
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (Path(folder) / name).relative_to(path).as_posix()


def _is_chunk(key: str, manifest: Manifest) -> bool:
    """Return whether a store of this manifest has this chunk. By arithmetic: the set of all keys could be large."""
    name, _, chunk = key.rpartition("/c/")
    numbers = chunk.split("/")
    if not all(number.isdecimal() and number.isascii() and len(number) < 20 for number in numbers):
        return False
    layout, first = manifest.layout, int(numbers[0])
    if name in {f"{SAMPLES}/{column}" for column in COLUMNS}:
        return chunk == str(first) and first * CHUNK_ROWS < layout.num_rows
    if len(numbers) < 2 or first >= layout.num_views or int(numbers[1]) >= layout.num_shards:
        return False
    unit = Unit(first, int(numbers[1]), 0, 0)
    return key == marker_key(unit) or any(key == shard_key(spec, unit) for spec in manifest.arrays)
