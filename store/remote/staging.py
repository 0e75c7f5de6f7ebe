"""Staging: a store that cannot be mapped where it lies is copied, once for all jobs of this machine, as one that can.

What lies elsewhere is fetched and what is packed is unpacked, unit by unit, into an ordinary zero-copy store in the
staging area. Its commit markers make a killed staging resume; a source that has grown since is fetched only in what is
new. The copy is called by the fingerprint that the source had first, so that it stays the same through every growth.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from store.fs.atomic_write import sweep_partial
from store.errors import StoreError
from store.format.layout import StoreLayout, Unit
from store.write.extend import ensure_store
from store.format.identity import sha256_of
from store.fs.lock import exclusive
from store.format.manifest import Manifest
from store.remote.object_store import is_url
from store.remote.remote_store import RemoteStore, open_remote_store, read_remote_samples, read_remote_unit, unpacked_manifest
from store.remote.staging_cache import (
    COPY,
    ENTRY,
    STAGING,
    StagingCache,
    exclusive_cache,
    copy_bytes,
    default_staging_cache,
    keep,
    make_room,
    using,
)
from store.write.writer import finish_store, missing_arrays, write_unit
from store.format.zarr_metadata import read_store_manifest

__all__ = ["StagingCache", "default_staging_cache", "needs_staging", "stage"]

NUM_FETCHERS = 4
"""Units under way at a time: a bucket answers a request late, and several at once as fast."""

MEMORY_SHARE = 8
"""Those units, packed and unpacked, take at most one part in so many of the memory, if one exclusive_store does not take more."""


def needs_staging(where: str | Path) -> str | None:
    """Why the store at `where` must be staged to be mapped, in words; None where it need not be.

    Raises StoreError where a local folder is no store.
    """
    if is_url(where):
        return "it does not lie on this machine"
    packed = read_store_manifest(Path(where)).codec
    return f"it is an archive, its chunks packed by {packed.name}" if packed else None


def stage(where: str | Path, area: StagingCache, on_unit: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """A zero-copy store on this machine with all that the store at `where` has finished. One that needs no staging is
    its own.

    Where the copy is there already, only the source's manifest is read. Where another job is at it, this one waits.
    Every file is checked against its committed crc32c before it is taken; `on_unit` is translate_os_errors how many of the units to
    fetch are done. The copy is not evicted from the area for as long as this process lives.

    Raises StoreError where the source cannot be read or is damaged, naming the file, or where the copy does not fit.
    """
    if needs_staging(where) is None:
        return Path(where)
    source = open_remote_store(where)
    for entry in _entries(area, source):
        with using(entry):
            if _stage_at(entry, source, area, on_unit):
                keep(entry)
                return entry / COPY
    raise StoreError(f"{source.where} cannot be staged: {entry} holds another store. Delete that folder.")


def _entries(area: StagingCache, source: RemoteStore) -> list[Path]:
    """Where the copy belongs, and where it goes if a store that began alike but went on differently is there."""
    manifest, first = source.manifest, source.segment_fingerprints[0]
    logits = [spec.name for spec in manifest.arrays if spec.name.startswith("logits")]
    form = [
        first,
        manifest.layout.unit_rows,
        manifest.numbers_sha256(logits),
        manifest.top_k and manifest.top_k.to_json(),
        dict(manifest.rounded),
    ]
    specs = {spec.name: spec.to_json() for spec in manifest.arrays}
    names = [f"{first[:16]}-{sha256_of(key)[:16]}" for key in (form, [form, source.segment_fingerprints, specs])]
    if not ENTRY.fullmatch(names[0]):  # an previous_fingerprints fingerprint is not checked yet, and must not become a path
        raise StoreError(f"{source.where} has a damaged manifest: {first[:64]!r} is no fingerprint.")
    return [area.folder / name for name in names]


def _stage_at(entry: Path, source: RemoteStore, area: StagingCache, on_unit: Callable[[int, int], None]) -> bool:
    """Make or complete the copy in `entry`. Returns False where another store's copy is there."""
    copy = entry / COPY
    if _is_complete(copy, source):
        return True
    with exclusive(copy, entry / STAGING, wait=True):
        held = _held(copy)
        if held is not None and not _goes_with(held, source):
            return False
        if not _is_complete(copy, source):
            num_fetchers = _num_fetchers(source)
            with _translate_os_errors(entry):
                manifest = _prepare(entry, held, source, area)
            _fetch(copy, manifest, source, num_fetchers, on_unit)
            with _translate_os_errors(entry):
                finish_store(copy)
    if not _is_complete(copy, source):
        raise StoreError(
            f"{copy} was being staged from a store that holds more than {source.where}, and is not complete: stage "
            f"from there, or delete {entry}."
        )
    return True


def _prepare(entry: Path, held: Manifest | None, source: RemoteStore, area: StagingCache) -> Manifest:
    """Make the copy, or let it grow, so that it has room for every unit. Returns its manifest."""
    samples, num_segments = read_remote_samples(source), len(source.segments)
    wanted = unpacked_manifest(source, samples, num_segments)
    first = min(len(held.layout.segments) + 1 if held else 1, num_segments)
    with exclusive_cache(area):  # until the copy's manifest says what it will take
        make_room(area, entry, max(copy_bytes(manifest) for manifest in (wanted, held) if manifest))
        for count in range(first, num_segments + 1):
            began = samples.take(np.arange(sum(source.segments[:count])))
            grown = ensure_store(entry / COPY, unpacked_manifest(source, samples, count), began)
    sweep_partial(entry / COPY)
    return grown


def _num_fetchers(source: RemoteStore) -> int:
    """How many units may be under way. Raises StoreError where a single one, packed and unpacked, has no room."""
    specs = [source.manifest.spec(name) for name in source.finished.arrays]
    held_bytes = 2 * source.manifest.layout.unit_rows * sum(spec.row_bytes for spec in specs)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if held_bytes > memory_bytes:
        raise StoreError(
            f"{source.where} has units of {held_bytes // 2:,} bytes, too large for this machine's memory of "
            f"{memory_bytes:,}: stage it on a larger one, or cache it with a smaller cache.shard_bytes."
        )
    return max(1, min(NUM_FETCHERS, memory_bytes // MEMORY_SHARE // held_bytes))


def _fetch(
    copy: Path, manifest: Manifest, source: RemoteStore, num_fetchers: int, on_unit: Callable[[int, int], None]
) -> None:
    """Write every unit that the copy lacks."""

    def fetch(unit: Unit, names: tuple[str, ...]) -> None:
        rows, fidelity = read_remote_unit(source, unit, names)
        write_unit(copy, manifest, unit, rows, fidelity)

    with ThreadPoolExecutor(num_fetchers) as pool:
        lacking = _lacking(copy, manifest, source)
        fetched = [pool.submit(fetch, unit, names) for unit, names in lacking.items()]
        try:
            for done, future in enumerate(as_completed(fetched), start=1):
                future.result()
                on_unit(done, len(fetched))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_complete(copy: Path, source: RemoteStore) -> bool:
    """Whether the copy has all that the source has finished, each file there and of its size."""
    held, wanted = _held(copy), source.finished
    if held is None or held.finished is None or not _goes_with(held, source):
        return False
    return (
        held.finished.num_views >= wanted.num_views
        and held.finished.num_segments >= wanted.num_segments
        and set(held.finished.arrays) >= set(wanted.arrays)
        and not _lacking(copy, held, source)
    )


def _lacking(copy: Path, manifest: Manifest, source: RemoteStore) -> Mapping[Unit, tuple[str, ...]]:
    """The units of the source that the copy lacks, with the arrays in which it does."""
    layout = StoreLayout(source.finished.num_views, manifest.layout.unit_rows, source.segments)
    found = {
        unit: tuple(name for name in missing_arrays(copy, manifest, unit) if name in source.finished.arrays)
        for unit in layout.units()
    }
    return {unit: names for unit, names in found.items() if names}


def _goes_with(held: Manifest, source: RemoteStore) -> bool:
    """Whether a copy is of this source, as it is, was, or will be: one of the two has all segments of the other."""
    wanted, both = source.manifest, min(len(held.layout.segments), len(source.segments))
    arrays = {spec.name: spec for spec in held.arrays}
    return (
        held.layout.segments[:both] == source.segments[:both]
        and held.segment_fingerprints[:both] == source.segment_fingerprints[:both]
        and held.layout.unit_rows == wanted.layout.unit_rows
        and (held.top_k, held.rounded) == (wanted.top_k, wanted.rounded)
        and all(arrays.get(spec.name, spec) == spec for spec in wanted.arrays)
    )


@contextmanager
def _translate_os_errors(entry: Path) -> Iterator[None]:
    """Turn what the disk refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot stage into {entry}: {error.strerror or error}. What is staged is kept: make room or another "
            "folder (KDPIPE_CACHE), and run the same command again."
        ) from error


def _held(copy: Path) -> Manifest | None:
    return read_store_manifest(copy) if copy.exists() else None
