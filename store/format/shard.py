"""One shard file in bytes: chunks, then the Zarr v3 `sharding_indexed` index, then the index's crc32c.

In the zero-copy profile the codec inside is `bytes` (little endian) exclusive_store, and chunks are cut along N only, so the
file is a run of rows followed by 16 bytes a chunk (offset, length) and a checksum. In an archive each chunk is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.format.codec import Codec
from store.errors import StoreError
from store.format.layout import ArraySpec, Unit, rows_per_chunk

ABSENT = 2**64 - 1
"""The index entry of an inner chunk that is not there: Zarr reads it as the fill value."""

CRC_BYTES = 4


@dataclass(frozen=True)
class ShardShape:
    """The cut of one array's shards: `num_chunks` inner chunks of `chunk_rows` rows each."""

    spec: ArraySpec
    chunk_rows: int
    num_chunks: int

    @property
    def index_bytes(self) -> int:
        return 16 * self.num_chunks + CRC_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an unpacked chunk."""
        return self.chunk_rows * self.spec.row_bytes

    def num_present(self, num_rows: int) -> int:
        """Inner chunks in a shard that holds `num_rows` rows."""
        return -(-num_rows // self.chunk_rows)

    def data_bytes(self, num_rows: int) -> int:
        """Bytes in front of the index of an unpacked shard: whole chunks."""
        return self.num_present(num_rows) * self.chunk_bytes

    def file_bytes(self, num_rows: int) -> int:
        """The size of an unpacked shard file."""
        return self.data_bytes(num_rows) + self.index_bytes


def shard_shape(spec: ArraySpec, unit_rows: int) -> ShardShape:
    chunk_rows = rows_per_chunk(spec, unit_rows)
    return ShardShape(spec, chunk_rows, unit_rows // chunk_rows)


def shard_key(spec: ArraySpec, unit: Unit) -> str:
    """Where `unit`'s shard of one array lies in the store, by Zarr's default chunk keys."""
    return "/".join([spec.name, "c", str(unit.view), str(unit.shard), *["0"] * len(spec.row_shape)])


def shard_path(store: Path, spec: ArraySpec, unit: Unit) -> Path:
    return store / shard_key(spec, unit)


def crc32c(*parts: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of `parts`, one behind the other."""
    checksum = 0
    for part in parts:
        checksum = google_crc32c.extend(checksum, np.frombuffer(part, np.uint8))
    return checksum


def encode_shard(rows: NDArray[Any], shape: ShardShape, codec: Codec | None = None) -> list[bytes | memoryview]:
    """A shard file of `rows` [n, ...] as parts to write one behind the other; unpacked rows are not copied.

    The last chunk is filled up with the array's fill value.
    """
    little = np.ascontiguousarray(rows, shape.spec.little)
    present = shape.num_present(len(little))
    padding_shape = (present * shape.chunk_rows - len(little), *little.shape[1:])
    padding = np.full(padding_shape, shape.spec.fill_value, little.dtype).tobytes()
    data = little.reshape(-1).view(np.uint8).data
    if codec is None:
        return [data, padding, _index(shape, [shape.chunk_bytes] * present)]
    chunks = [codec.encode(chunk, little.itemsize) for chunk in _chunks(data, padding, shape.chunk_bytes)]
    return [*chunks, _index(shape, [len(chunk) for chunk in chunks])]


def decode_shard(raw: bytes, shape: ShardShape, num_rows: int, codec: Codec | None, where: str) -> NDArray[Any]:
    """The rows [num_rows, *row_shape] of a shard file. Raises StoreError where it is damaged."""
    row_shape = shape.spec.row_shape
    if codec is None:
        check_index(raw[-shape.index_bytes :], shape, num_rows, where)
        rows: NDArray[Any] = np.frombuffer(raw, shape.spec.little, count=num_rows * int(np.prod(row_shape)))
        return rows.reshape(num_rows, *row_shape)
    lengths = _packed_lengths(raw, shape, num_rows, where)
    out = np.empty((len(lengths) * shape.chunk_rows, *row_shape), shape.spec.little)
    unpacked, at = out.reshape(-1).view(np.uint8).data, 0
    for number, length in enumerate(lengths):
        chunk = unpacked[number * shape.chunk_bytes : (number + 1) * shape.chunk_bytes]
        codec.decode_into(raw[at : at + length], chunk, where)
        at += length
    return out[:num_rows]


def check_index(raw: bytes, shape: ShardShape, num_rows: int, where: str) -> None:
    """Raise StoreError unless `raw`, the tail of an unpacked shard, is exactly the index that `num_rows` rows have."""
    _check_checksum(raw, where)
    if raw != _index(shape, [shape.chunk_bytes] * shape.num_present(num_rows)):
        raise StoreError(f"{where} is not laid out as kdpipe writes shards: its rows cannot be mapped.")


def _index(shape: ShardShape, lengths: list[int]) -> bytes:
    """The index of a shard whose first chunks have `lengths` bytes and whose others are absent, with its checksum."""
    index = np.full((shape.num_chunks, 2), ABSENT, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]]) if lengths else []
    raw = index.tobytes()
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little")


def _packed_lengths(raw: bytes, shape: ShardShape, num_rows: int, where: str) -> list[int]:
    """Chunk lengths of an archive's shard, which must lie one behind the other and fill the file."""
    tail = raw[-shape.index_bytes :]
    _check_checksum(tail, where)
    present = shape.num_present(num_rows)
    if len(tail) == shape.index_bytes:
        lengths = [int(one) for one in np.frombuffer(tail[:-CRC_BYTES], "<u8").reshape(-1, 2)[:present, 1]]
        if sum(lengths) + shape.index_bytes == len(raw) and tail == _index(shape, lengths):
            return lengths
    raise StoreError(f"{where} is not laid out as kdpipe writes shards: its chunks do not follow each other.")


def _check_checksum(tail: bytes, where: str) -> None:
    body, checksum = tail[:-CRC_BYTES], int.from_bytes(tail[-CRC_BYTES:], "little")
    if crc32c(body) != checksum:
        raise StoreError(f"{where} is damaged: its shard index has another checksum than it was written with.")


def _chunks(data: memoryview, padding: bytes, chunk_bytes: int) -> Iterator[bytes]:
    for at in range(0, len(data), chunk_bytes):
        chunk = bytes(data[at : at + chunk_bytes])
        yield chunk + padding if len(chunk) < chunk_bytes else chunk
