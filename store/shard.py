"""One shard file in bytes: rows, then the Zarr v3 `sharding_indexed` index, then the index's crc32c.

The codec inside is `bytes` (little endian), with no compressor and chunks along N only, so the inner chunks lie
in ascending order and the file is a run of rows followed by 16 bytes a chunk (offset, length) and a checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.geometry import ArraySpec, Unit, rows_per_chunk

ABSENT = 2**64 - 1
"""The index entry of an inner chunk that is not there: Zarr reads it as the fill value."""

CRC_BYTES = 4


@dataclass(frozen=True)
class ShardShape:
    """The cut of one array's shards: `num_chunks` inner chunks of `chunk_rows` rows of `row_bytes` bytes."""

    chunk_rows: int
    num_chunks: int
    row_bytes: int

    @property
    def index_bytes(self) -> int:
        return 16 * self.num_chunks + CRC_BYTES

    def num_present(self, num_rows: int) -> int:
        """Inner chunks in a shard that holds `num_rows` rows."""
        return -(-num_rows // self.chunk_rows)

    def data_bytes(self, num_rows: int) -> int:
        """Bytes in front of the index: whole chunks."""
        return self.num_present(num_rows) * self.chunk_rows * self.row_bytes

    def file_bytes(self, num_rows: int) -> int:
        return self.data_bytes(num_rows) + self.index_bytes


def shard_shape(spec: ArraySpec, unit_rows: int) -> ShardShape:
    chunk_rows = rows_per_chunk(spec, unit_rows)
    return ShardShape(chunk_rows, unit_rows // chunk_rows, spec.row_bytes)


def shard_path(store: Path, spec: ArraySpec, unit: Unit) -> Path:
    """The file of `unit`'s shard in one array, by Zarr's default chunk keys."""
    return store.joinpath(spec.name, "c", str(unit.view), str(unit.shard), *["0"] * len(spec.row_shape))


def crc32c(*parts: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of `parts`, one behind the other."""
    checksum = 0
    for part in parts:
        checksum = google_crc32c.extend(checksum, np.frombuffer(part, np.uint8))
    return checksum


def encode_index(shape: ShardShape, num_rows: int) -> bytes:
    """The index of a shard that holds `num_rows` rows, with its checksum."""
    present = shape.num_present(num_rows)
    chunk_bytes = shape.chunk_rows * shape.row_bytes
    index = np.full((shape.num_chunks, 2), ABSENT, "<u8")
    index[:present, 0] = np.arange(present, dtype="<u8") * chunk_bytes
    index[:present, 1] = chunk_bytes
    raw = index.tobytes()
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little")


def encode_shard(rows: NDArray[np.floating], shape: ShardShape) -> list[bytes | memoryview]:
    """A shard file of `rows` [n, ...] as parts to write one behind the other, the rows not copied.

    The last chunk is filled up with NaN, the array's fill value.
    """
    little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    num_rows = len(little)
    padding = np.full(
        (shape.num_present(num_rows) * shape.chunk_rows - num_rows, *little.shape[1:]), np.nan, little.dtype
    )
    return [little.reshape(-1).view(np.uint8).data, padding.tobytes(), encode_index(shape, num_rows)]


def check_index(raw: bytes, shape: ShardShape, num_rows: int, where: str) -> None:
    """Raise StoreError unless `raw`, the tail of a shard file, is exactly the index that `num_rows` rows must have."""
    body, checksum = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:], "little")
    if crc32c(body) != checksum:
        raise StoreError(f"{where} is damaged: its shard index has another checksum than it was written with.")
    if raw != encode_index(shape, num_rows):
        raise StoreError(f"{where} is not laid out as kdpipe writes shards: its rows cannot be mapped.")
