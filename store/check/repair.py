"""Repair a damaged store as far as possible without the teacher: samples, and what counts as done."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.check.verify import Fault
from kdpipe.store.errors import StoreError
from kdpipe.store.format.layout import StoreLayout, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import Marker, read_marker, remove_marker, write_marker
from kdpipe.store.format.samples import Samples, read_column, row_order, sample_chunks
from kdpipe.store.fs.atomic_write import make_folders, write_atomically
from kdpipe.store.fs.lock import Holder
from kdpipe.store.fs.safe_read import read_regular_file
from kdpipe.store.write.claims import claimed

HOPELESS = "cannot be repaired: delete it, and cache again"


def uncommit(path: Path, manifest: Manifest, faults: Iterable[Fault]) -> list[Unit]:
    """Revoke that the damaged arrays of units are done, of a damaged marker all arrays, and return these units.

    Raises LockedError where another job is computing one of them.
    """
    bad: dict[Unit, set[str | None]] = {}
    for fault in faults:
        if fault.unit is not None:
            bad.setdefault(fault.unit, set()).add(fault.array)
    for unit, names in bad.items():
        with claimed(path, unit.key, partial(_in_use, path, unit)):
            _uncommit_arrays(path, manifest, unit, names)
    return list(bad)


def _in_use(path: Path, unit: Unit, holder: Holder) -> str:
    return f"{unit} of {path} is being computed by {holder}: wait for that job, or stop it first."


def _uncommit_arrays(path: Path, manifest: Manifest, unit: Unit, names: set[str | None]) -> None:
    try:
        marker = read_marker(path, manifest, unit)
    except StoreError:
        marker = None
    files = {} if marker is None or None in names else {k: v for k, v in marker.files.items() if k not in names}
    if marker is not None and files:
        write_marker(path, manifest, unit, Marker(files, marker.fidelity))
    else:
        remove_marker(path, unit)


def restore_samples(path: Path, manifest: Manifest, known: Samples) -> None:
    """Rewrite the damaged sample arrays from the samples of the data set, in any order.

    Raises StoreError where that is another one, or does not determine the row of each sample.
    """
    samples = known.take(known.positions_of(_ids_by_row(path, manifest, known)))
    if any(manifest.identity.data.get(name) != digest for name, digest in samples.digests().items()):
        raise StoreError(
            f"the samples of {path} are damaged, and this recipe's data set is not the one that it was made from: use "
            f"the recipe that made it, or else it {HOPELESS}."
        )
    for key, raw in sample_chunks(samples, manifest.layout):
        file = path / key
        if not file.is_file() or file.read_bytes() != raw:
            make_folders([file.parent])
            write_atomically(file, raw)


def _stored_ids(path: Path, layout: StoreLayout) -> NDArray[np.int64] | None:
    """Return the id in each row [num_samples] as stored; None where a chunk is lost."""

    def read(key: str, max_bytes: int) -> bytes | None:
        with suppress(OSError):
            return read_regular_file(path / key, max_bytes, path)
        return None

    with suppress(StoreError):
        return read_column(read, "ids", layout, str(path))[layout.sample_rows()].astype(np.int64)
    return None


def _ids_by_row(path: Path, manifest: Manifest, known: Samples) -> NDArray[np.int64]:
    """Return the id in each row [num_samples]; damaged ones are deduced where the store was never extended."""
    stored = _stored_ids(path, manifest.layout)
    if stored is not None and np.array_equal(np.sort(stored), np.sort(known.ids)):
        return stored
    if len(manifest.layout.segments) == 1:
        return known.ids[row_order(known.ids, int(manifest.identity.views["seed"]))]
    raise StoreError(
        f"the sample ids of {path} are damaged, and this recipe's data set does not determine them: use the "
        f"recipe that made it, or else it {HOPELESS}."
    )
