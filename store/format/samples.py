"""Which samples a store holds: their ids, labels and pixel checksums, row by row, in the Zarr group `samples`.

The arrays are raw and cut into small chunks, so that growing appends: a reader that knows of fewer rows reads the
same values before, during and after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.format.layout import StoreLayout
from store.fs.safe_read import read_regular_file

SAMPLES = "samples"

CHUNK_ROWS = 8192

COLUMNS: dict[str, tuple[str, int]] = {"ids": ("int64", -1), "labels": ("int64", -1), "pixels_crc32c": ("uint32", 0)}
"""The arrays with their types and what stands in rows that hold no sample."""

ReadKey: TypeAlias = Callable[[str, int], bytes | None]
"""(key, most bytes) -> the bytes of one of a store's files, or None where there is none."""

_WORD = 2**64


@dataclass(frozen=True)
class Samples:
    """The samples of a store, in the order of their rows: ids int64 [N], unique and >= 0; labels int64 [N];
    crc32c of each one's pixels, uint32 [N].
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels_crc32c: NDArray[np.uint32]

    def digests(self) -> dict[str, str]:
        """sha256 over ids and labels, and over the pixel checksums: the same on every machine and in any order."""
        by_id = self.take(np.argsort(self.ids))
        return {
            "ids_and_labels_sha256": ids_and_labels_sha256(by_id.ids, by_id.labels),
            "pixels_sha256": hashlib.sha256(by_id.pixels_crc32c.astype("<u4").tobytes()).hexdigest(),
        }

    def take(self, at: NDArray[Any]) -> Samples:
        """The samples at these positions."""
        return Samples(self.ids[at], self.labels[at], self.pixels_crc32c[at])

    def positions_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples stand among these, int64 [B]; -1 for those that do not."""
        order = np.argsort(self.ids)
        at = order[np.minimum(np.searchsorted(self.ids, sample_ids, sorter=order), len(order) - 1)]
        return np.where(self.ids[at] == sample_ids, at, -1)

    def followed_by(self, others: Samples) -> Samples:
        """These samples and then `others`."""
        return Samples(
            np.concatenate([self.ids, others.ids]),
            np.concatenate([self.labels, others.labels]),
            np.concatenate([self.pixels_crc32c, others.pixels_crc32c]),
        )


def ids_and_labels_sha256(ids: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """sha256, in hexadecimal, over all ids and then all labels, int64 little-endian, ordered by id."""
    order = np.argsort(ids)
    return hashlib.sha256(ids[order].astype("<i8").tobytes() + labels[order].astype("<i8").tobytes()).hexdigest()


def row_order(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The positions of samples in the order of their rows: a permutation that looks random and depends on ids exclusive_store.

    Because rows stand in no order, an epoch that reads slab after slab mixes like a full shuffle. The key of a
    sample is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over its id and the seed.
    """
    with np.errstate(over="ignore"):
        keys = _mix(_mix(ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed % _WORD))
    return np.lexsort((ids, keys))


def sample_chunks(samples: Samples, layout: StoreLayout, first_row: int = 0) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of every chunk of the sample arrays that holds rows from `first_row` on."""
    rows = layout.sample_rows()
    num_chunks = -(-layout.num_rows // CHUNK_ROWS)
    for name, (dtype, empty) in COLUMNS.items():
        column = np.full(num_chunks * CHUNK_ROWS, empty, np.dtype(dtype).newbyteorder("<"))
        column[rows] = getattr(samples, name)
        for chunk in range(first_row // CHUNK_ROWS, num_chunks):
            yield f"{SAMPLES}/{name}/c/{chunk}", column[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS].tobytes()


def sample_chunk_keys(layout: StoreLayout) -> list[str]:
    """Where the chunks of the sample arrays lie."""
    num_chunks = -(-layout.num_rows // CHUNK_ROWS)
    return [f"{SAMPLES}/{name}/c/{chunk}" for name in COLUMNS for chunk in range(num_chunks)]


def read_samples(path: Path, layout: StoreLayout, data: Mapping[str, Any]) -> Samples:
    """Read the samples of the store at `path` and check them against the digests in its identity's `data`."""
    return samples_from(partial(_read_chunk, path), layout, data, str(path))


def samples_from(read: ReadKey, layout: StoreLayout, data: Mapping[str, Any], where: str) -> Samples:
    """The samples of the store at `where`, wherever that is, checked like those that `read_samples` reads.

    A chunk is asked for after the one before it has come: what a manifest only claims to hold takes no memory.
    """
    samples = Samples(**{name: _read_column(read, name, layout, where) for name in COLUMNS})
    if any(data.get(key) != digest for key, digest in samples.digests().items()):
        raise StoreError(f"{where}/{SAMPLES} is damaged: its digests do not fit. Run `kdpipe store repair RECIPE`.")
    return samples


def _read_chunk(path: Path, key: str, max_bytes: int) -> bytes:
    try:
        return read_regular_file(path / key, max_bytes, path)
    except OSError as error:
        raise StoreError(
            f"{path / key} cannot be read ({error.strerror}): run `kdpipe store repair RECIPE`."
        ) from error


def _read_column(read: ReadKey, name: str, layout: StoreLayout, where: str) -> NDArray[Any]:
    dtype = np.dtype(COLUMNS[name][0]).newbyteorder("<")
    num_chunks, chunk_bytes = -(-layout.num_rows // CHUNK_ROWS), CHUNK_ROWS * dtype.itemsize
    parts = []
    for chunk in range(num_chunks):
        key = f"{SAMPLES}/{name}/c/{chunk}"
        raw = read(key, chunk_bytes)
        if raw is None or len(raw) != chunk_bytes:
            found = "it is missing" if raw is None else f"it does not have {chunk_bytes:,} bytes"
            raise StoreError(f"{where}/{key} is damaged: {found}. Run `kdpipe store repair RECIPE`.")
        parts.append(np.frombuffer(raw, dtype))
    column: NDArray[Any] = np.concatenate(parts)[layout.sample_rows()].astype(COLUMNS[name][0])
    return column


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
