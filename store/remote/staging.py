"""Staging: copy a store that cannot be mapped where it is, once for all jobs of this machine, into one that can.

Remote files are fetched and compressed chunks decompressed, unit by unit, into an ordinary zero-copy store in the
staging cache. Its commit markers make a killed staging resume; of a store that has grown since, only the new part is
fetched. The copy is named after the first fingerprint of the store, which stays the same when the store grows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kdpipe.store.errors import StoreError, explain, translate_os_errors
from kdpipe.store.format.identity import sha256_of
from kdpipe.store.format.layout import StoreLayout, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.unit_state import missing_arrays
from kdpipe.store.format.zarr_metadata import read_store_manifest
from kdpipe.store.fs.atomic_write import sweep_partial
from kdpipe.store.fs.lock import LockedError, exclusive
from kdpipe.store.remote.object_store import is_url
from kdpipe.store.remote.remote_store import (
    RemoteStore,
    open_remote_store,
    read_remote_head,
    read_remote_samples,
    read_remote_unit,
    unpacked_manifest,
)
from kdpipe.store.remote.staging_cache import (
    COPY,
    ENTRY,
    StagingCache,
    copy_bytes,
    exclusive_cache,
    keep,
    make_room,
    using,
)
from kdpipe.store.write.extend import grow
from kdpipe.store.write.writer import create_store, finish_store, write_unit

NUM_FETCHERS = 4
"""Units fetched at a time, to hide the latency of a bucket."""

WAIT_S = 0.1
"""Interval at which the lock of a job that stages the same store is tried."""

MEMORY_SHARE = 8
"""Those units, compressed and decompressed, use at most 1/MEMORY_SHARE of the memory, or one at a time is fetched."""


def needs_staging(where: str | Path) -> str | None:
    """Return why the store at `where` must be staged to be mapped; None where it need not be.

    Raises StoreError where a local folder is not a store.
    """
    if is_url(where):
        return "it is not on this machine"
    packed = read_store_manifest(Path(where)).codec
    return f"it is an archive, its chunks compressed by {packed.name}" if packed else None


def stage(
    where: str | Path,
    cache: StagingCache,
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Return a zero-copy store on this machine with the finished part of the store at `where`, a folder or a URL.

    A store that needs no staging is returned as it is. If the copy exists already, only the remote manifest is read.
    Waits for another job that is staging it. Every file is checked against its committed crc32c. The copy is not
    evicted from the cache while this process lives. `on_unit` is called with (units fetched, units to fetch), and
    `check` while a server or another job is waited for; both may raise, to stop.

    Raises StoreError where the store cannot be read or is damaged (the error names the file), or the copy does not fit.
    """
    if needs_staging(where) is None:
        return Path(where)
    remote = open_remote_store(where, check)
    for entry in _entries(cache, remote):
        with using(entry):
            if _stage_at(entry, remote, cache, on_unit, check):
                keep(entry)
                return entry / COPY
    raise StoreError(f"{remote.where} cannot be staged: {entry} holds another store. Delete that folder.")


def _entries(cache: StagingCache, remote: RemoteStore) -> list[Path]:
    """Return the entry of the copy, and an alternative if a store that began alike but went on differently is there."""
    manifest, first = remote.manifest, remote.segment_fingerprints[0]
    logits = [spec.name for spec in manifest.arrays if spec.name.startswith("logits")]
    encoding = [manifest.layout.unit_rows, manifest.numbers_sha256(logits), dict(manifest.rounded)]
    specs = {spec.name: spec.to_json() for spec in manifest.arrays}
    names = [
        f"{first[:16]}-{sha256_of(key)[:16]}" for key in (encoding, [encoding, remote.segment_fingerprints, specs])
    ]
    if not ENTRY.fullmatch(names[0]):  # not checked yet, and must not become a path
        raise StoreError(f"{remote.where} has a damaged manifest: {first[:64]!r} is not a fingerprint.")
    return [cache.folder / name for name in names]


@contextmanager
def _alone(copy: Path, entry: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an entry inside the block; wait for the job that has it, perhaps for hours."""
    with ExitStack() as locks:
        while True:
            try:
                locks.enter_context(exclusive(copy, entry / "staging.lock"))
                break
            except LockedError:
                check()
                time.sleep(WAIT_S)
        yield


def _stage_at(
    entry: Path,
    remote: RemoteStore,
    cache: StagingCache,
    on_unit: Callable[[int, int], None],
    check: Callable[[], None],
) -> bool:
    """Make or complete the copy in `entry`. Returns False where another store's copy is there."""
    copy = entry / COPY
    if _is_complete(copy, remote):
        return True
    with _alone(copy, entry, check):
        stored = _copy_manifest(copy)
        can_become = stored is None or (
            _is_copy_of(stored, remote) and len(stored.layout.segments) <= len(remote.segments)
        )
        if can_become and not _is_complete(copy, remote):
            with translate_os_errors(partial(_failure, entry)):
                _fetch(copy, _prepare(entry, stored, remote, cache), remote, on_unit)
                finish_store(copy)
    return _is_complete(copy, remote)


def _prepare(entry: Path, stored: Manifest | None, remote: RemoteStore, cache: StagingCache) -> Manifest:
    """Create or extend the copy, so that it has room for every unit. Returns its manifest."""
    samples, copy = read_remote_samples(remote), entry / COPY
    wanted = unpacked_manifest(remote, samples)
    if stored is not None:
        names = {spec.name for spec in stored.arrays}
        arrays = (*stored.arrays, *[spec for spec in wanted.arrays if spec.name not in names])
        num_views = max(stored.layout.num_views, wanted.layout.num_views)
        layout = replace(wanted.layout, num_views=num_views)
        wanted = replace(
            wanted, arrays=arrays, layout=layout, finished=stored.finished, head=wanted.head or stored.head
        )
    with exclusive_cache(cache):  # until the copy's manifest records its size
        make_room(cache, entry, copy_bytes(wanted))
        if stored is None:
            create_store(copy, wanted, samples, read_remote_head(remote))
        else:
            added = samples.take(np.arange(stored.layout.num_samples, len(samples.ids)))
            head = None if wanted.head == stored.head else read_remote_head(remote)
            grow(copy, stored, wanted, added, head)
    sweep_partial(copy)
    return wanted


def _fetch(copy: Path, manifest: Manifest, remote: RemoteStore, on_unit: Callable[[int, int], None]) -> None:
    """Write every unit that the copy lacks."""
    unit_bytes = 2 * manifest.layout.unit_rows * sum(spec.row_bytes for spec in manifest.arrays)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num_fetchers = max(1, min(NUM_FETCHERS, memory_bytes // MEMORY_SHARE // unit_bytes))

    def fetch(unit: Unit, names: tuple[str, ...]) -> None:
        rows, fidelity = read_remote_unit(remote, unit, names)
        write_unit(copy, manifest, unit, rows, fidelity)

    with ThreadPoolExecutor(num_fetchers) as pool:
        lacking = _lacking(copy, manifest, remote)
        fetched = [pool.submit(fetch, unit, names) for unit, names in lacking.items()]
        try:
            for done, future in enumerate(as_completed(fetched), start=1):
                future.result()
                on_unit(done, len(fetched))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_complete(copy: Path, remote: RemoteStore) -> bool:
    """Return whether the copy has the finished part of the remote store, each file with its size."""
    stored, wanted = _copy_manifest(copy), remote.finished
    if stored is None or stored.finished is None or not _is_copy_of(stored, remote):
        return False
    return (
        stored.finished.num_views >= wanted.num_views
        and stored.finished.num_segments >= wanted.num_segments
        and set(stored.finished.arrays) >= set(wanted.arrays)
        and remote.manifest.head in (None, stored.head)
        and not _lacking(copy, stored, remote)
    )


def _lacking(copy: Path, manifest: Manifest, remote: RemoteStore) -> Mapping[Unit, tuple[str, ...]]:
    """Return the units that the copy lacks, with the arrays that each lacks."""
    layout = StoreLayout(remote.finished.num_views, manifest.layout.unit_rows, remote.segments)
    found = {
        unit: tuple(name for name in missing_arrays(copy, manifest, unit) if name in remote.finished.arrays)
        for unit in layout.units()
    }
    return {unit: names for unit, names in found.items() if names}


def _is_copy_of(stored: Manifest, remote: RemoteStore) -> bool:
    """Return whether a copy is of this store at some time: one of the two has all segments of the other."""
    wanted, shared = remote.manifest, min(len(stored.layout.segments), len(remote.segments))
    arrays = {spec.name: spec for spec in stored.arrays}
    return (
        stored.layout.segments[:shared] == remote.segments[:shared]
        and stored.segment_fingerprints[:shared] == remote.segment_fingerprints[:shared]
        and stored.layout.unit_rows == wanted.layout.unit_rows
        and (stored.encoding, stored.rounded) == (wanted.encoding, wanted.rounded)
        and (stored.head == wanted.head or None in (stored.head, wanted.head))
        and all(arrays.get(spec.name, spec) == spec for spec in wanted.arrays)
    )


def _failure(entry: Path, error: OSError) -> str:
    reason, advice = explain(error)
    return (
        f"cannot stage into {entry}: {reason}. What is staged is kept: {advice}, or set another folder (KDPIPE_CACHE), "
        "and run the same command again."
    )


def _copy_manifest(copy: Path) -> Manifest | None:
    return read_store_manifest(copy) if copy.exists() else None
