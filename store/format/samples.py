"""Samples of a store: ids, labels and pixel checksums, row by row, in the Zarr group `samples`.

The arrays are raw and cut into small chunks, so that growing appends: a reader that sees fewer rows reads the same
values before, during and after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError, translate_os_errors
from kdpipe.store.format.layout import StoreLayout
from kdpipe.store.format.schema import SAMPLES
from kdpipe.store.fs.safe_read import read_regular_file

CHUNK_ROWS = 8192

COLUMNS: dict[str, tuple[str, int]] = {"ids": ("int64", -1), "labels": ("int64", -1), "pixels_crc32c": ("uint32", 0)}
"""By array, its dtype and the value in rows without a sample."""

ReadKey: TypeAlias = Callable[[str, int], bytes | None]
"""(key, max_bytes) -> the bytes of one of a store's files, or None where there is none."""

SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
"""Increment of SplitMix64's state: 2^64 divided by the golden ratio."""


@dataclass(frozen=True)
class Samples:
    """Samples of a store, in the order of their rows.

    Attributes:
        ids: int64 [N], unique and >= 0.
        labels: int64 [N].
        pixels_crc32c: crc32c of the pixels, uint32 [N].
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels_crc32c: NDArray[np.uint32]

    def digests(self) -> dict[str, str]:
        """Return sha256 over ids and labels, and over pixel checksums: independent of machine and order."""
        by_id = self.take(np.argsort(self.ids))
        return {
            "ids_and_labels_sha256": ids_and_labels_sha256(by_id.ids, by_id.labels),
            "pixels_sha256": hashlib.sha256(by_id.pixels_crc32c.astype("<u4").tobytes()).hexdigest(),
        }

    def take(self, indices: NDArray[Any]) -> Samples:
        """Return the samples at some positions, or under a mask."""
        return Samples(self.ids[indices], self.labels[indices], self.pixels_crc32c[indices])

    def positions_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of samples by id, int64 [B]; -1 for absent ones."""
        order = np.argsort(self.ids)
        positions = order[np.minimum(np.searchsorted(self.ids, sample_ids, sorter=order), len(order) - 1)]
        return np.where(self.ids[positions] == sample_ids, positions, -1)

    def followed_by(self, others: Samples) -> Samples:
        """Return these samples and then `others`."""
        return Samples(
            np.concatenate([self.ids, others.ids]),
            np.concatenate([self.labels, others.labels]),
            np.concatenate([self.pixels_crc32c, others.pixels_crc32c]),
        )


def ids_and_labels_sha256(ids: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Return the hexadecimal sha256 over all ids and then all labels, int64 little-endian, ordered by id."""
    order = np.argsort(ids)
    return hashlib.sha256(ids[order].astype("<i8").tobytes() + labels[order].astype("<i8").tobytes()).hexdigest()


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64, to each number.

    The generator's n-th output from `seed` is `splitmix64(seed + n * SPLITMIX_INCREMENT)`.
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def row_order(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the positions of samples in the order of their rows: sorted by a SplitMix64 hash of id and seed.

    An epoch that reads slab after slab of this pseudorandom permutation mixes like a full shuffle.
    """
    with np.errstate(over="ignore"):
        keys = splitmix64(ids.astype(np.uint64) + np.uint64(SPLITMIX_INCREMENT))
    return np.lexsort((ids, splitmix64(keys ^ np.uint64(seed % 2**64))))


def column_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of a sample array on disk."""
    return np.dtype(COLUMNS[name][0]).newbyteorder("<")


def column_keys(name: str, layout: StoreLayout) -> Iterator[str]:
    """Yield the keys of the chunks of a sample array: lazily, as an untrusted manifest may claim any number."""
    return (f"{SAMPLES}/{name}/c/{chunk}" for chunk in range(-(-layout.num_rows // CHUNK_ROWS)))


def sample_chunks(samples: Samples, layout: StoreLayout, first_row: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield (key, bytes) of every chunk of the sample arrays that holds rows from `first_row` on."""
    rows = layout.sample_rows()
    for name, (_, empty) in COLUMNS.items():
        keys = list(column_keys(name, layout))
        column = np.full(len(keys) * CHUNK_ROWS, empty, column_dtype(name))
        column[rows] = getattr(samples, name)
        for chunk in range(first_row // CHUNK_ROWS, len(keys)):
            yield keys[chunk], column[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS].tobytes()


def read_samples(path: Path, layout: StoreLayout, data: Mapping[str, Any]) -> Samples:
    """Read the samples of the store at `path` and check them against the digests in its identity's `data`."""

    def read(key: str, max_bytes: int) -> bytes:
        with translate_os_errors(
            lambda e: f"{path / key} cannot be read ({e.strerror}): run `kdpipe store repair RECIPE`."
        ):
            return read_regular_file(path / key, max_bytes, path)

    return samples_from(read, layout, data, str(path))


def samples_from(read: ReadKey, layout: StoreLayout, data: Mapping[str, Any], where: str) -> Samples:
    """Read the samples of a local or remote store through `read`; checked as by `read_samples`."""
    rows = layout.sample_rows()
    columns = {name: read_column(read, name, layout, where)[rows].astype(COLUMNS[name][0]) for name in COLUMNS}
    samples = Samples(**columns)
    if any(data.get(key) != digest for key, digest in samples.digests().items()):
        raise StoreError(f"{where}/{SAMPLES} is damaged: its digests do not match. Run `kdpipe store repair RECIPE`.")
    return samples


def read_column(read: ReadKey, name: str, layout: StoreLayout, where: str) -> NDArray[Any]:
    """Read all rows of a sample array, including rows without a sample. Raises StoreError where a chunk is bad.

    Chunks are read one after the other: what a manifest only claims to hold takes no memory.
    """
    dtype, parts = column_dtype(name), []
    chunk_bytes = CHUNK_ROWS * dtype.itemsize
    for key in column_keys(name, layout):
        raw = read(key, chunk_bytes)
        if raw is None or len(raw) != chunk_bytes:
            fault = "it is missing" if raw is None else f"it does not have {chunk_bytes:,} bytes"
            raise StoreError(f"{where}/{key} is damaged: {fault}. Run `kdpipe store repair RECIPE`.")
        parts.append(np.frombuffer(raw, dtype))
    return np.concatenate(parts)
