"""Shard files: chunks, then the Zarr v3 `sharding_indexed` index, then the index's crc32c.

In the zero-copy profile the inner codec is `bytes` (little-endian) alone and chunks are cut along N only, so the file
is a run of rows followed by 16 bytes per chunk (offset, length) and a checksum. In an archive each chunk is compressed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.codec import Codec
from kdpipe.store.format.layout import ArraySpec, Unit, rows_per_chunk
from kdpipe.store.fs.safe_read import open_regular_file

ABSENT = 2**64 - 1
"""Index entry of an absent inner chunk: Zarr reads it as the fill value."""

CRC_BYTES = 4

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class ShardShape:
    """Division of one array's shards: `num_chunks` inner chunks of `chunk_rows` rows each."""

    spec: ArraySpec
    chunk_rows: int
    num_chunks: int

    @property
    def index_bytes(self) -> int:
        return 16 * self.num_chunks + CRC_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an uncompressed chunk."""
        return self.chunk_rows * self.spec.row_bytes

    def num_present(self, num_rows: int) -> int:
        """Return the number of inner chunks in a shard of `num_rows` rows."""
        return -(-num_rows // self.chunk_rows)

    def data_bytes(self, num_rows: int) -> int:
        """Return the bytes before the index of an uncompressed shard: whole chunks."""
        return self.num_present(num_rows) * self.chunk_bytes

    def file_bytes(self, num_rows: int) -> int:
        """Return the size of an uncompressed shard file."""
        return self.data_bytes(num_rows) + self.index_bytes

    def may_have(self, num_bytes: int, num_rows: int, codec: Codec | None) -> bool:
        """Return whether a shard file may have `num_bytes`: an untrusted marker must not decide how much is read.

        Incompressible data grow by n/256 and a header per chunk.
        """
        if codec is None:
            return num_bytes == self.file_bytes(num_rows)
        return num_bytes <= self.file_bytes(num_rows) + self.num_present(num_rows) * (self.chunk_bytes // 128 + 1024)


def shard_shape(spec: ArraySpec, unit_rows: int) -> ShardShape:
    chunk_rows = rows_per_chunk(spec, unit_rows)
    return ShardShape(spec, chunk_rows, unit_rows // chunk_rows)


def shard_key(spec: ArraySpec, unit: Unit) -> str:
    """Return the key of `unit`'s shard of one array, by Zarr's default chunk keys."""
    return "/".join([spec.name, "c", str(unit.view), str(unit.shard), *["0"] * len(spec.row_shape)])


def shard_path(store: Path, spec: ArraySpec, unit: Unit) -> Path:
    return store / shard_key(spec, unit)


def crc32c(*parts: bytes | memoryview) -> int:
    """Return the CRC-32C (Castagnoli) of the concatenated `parts`."""
    checksum = 0
    for part in parts:
        checksum = google_crc32c.extend(checksum, np.frombuffer(part, np.uint8))
    return checksum


def is_committed(raw: bytes, entry: Mapping[str, int]) -> bool:
    """Return whether a file has the size and checksum in a marker's entry, `bytes` and `crc32c`."""
    return len(raw) == entry["bytes"] and crc32c(raw) == entry["crc32c"]


def is_committed_file(file: Path, entry: Mapping[str, int], root: Path) -> bool:
    """Return whether the file of a shard has the size and checksum in a marker's entry; it is read in pieces.

    Raises OSError as `open_regular_file` does.
    """
    buffer, checksum, num_bytes = bytearray(PIECE_BYTES), 0, 0
    with os.fdopen(open_regular_file(file, root), "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            checksum = google_crc32c.extend(checksum, np.frombuffer(buffer, np.uint8, count))
            num_bytes += count
    return num_bytes == entry["bytes"] and checksum == entry["crc32c"]


def encode_shard(rows: NDArray[Any], shape: ShardShape, codec: Codec | None = None) -> list[bytes | memoryview]:
    """Encode `rows` [n, ...] as the parts of a shard file; uncompressed rows are not copied.

    The last chunk is padded with the array's fill value.
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
    """Decode the rows [num_rows, *row_shape] of a shard file. Raises StoreError where it is damaged."""
    row_shape = shape.spec.row_shape
    if codec is None:
        check_index(raw[-shape.index_bytes :], shape, num_rows, where)
        rows: NDArray[Any] = np.frombuffer(raw, shape.spec.little, count=num_rows * int(np.prod(row_shape)))
        return rows.reshape(num_rows, *row_shape)
    lengths = _packed_lengths(raw, shape, num_rows, where)
    out = np.empty((len(lengths) * shape.chunk_rows, *row_shape), shape.spec.little)
    unpacked, offset = out.reshape(-1).view(np.uint8).data, 0
    for number, length in enumerate(lengths):
        chunk = unpacked[number * shape.chunk_bytes : (number + 1) * shape.chunk_bytes]
        codec.decode_into(raw[offset : offset + length], chunk, where)
        offset += length
    return out[:num_rows]


def check_index(raw: bytes, shape: ShardShape, num_rows: int, where: str) -> None:
    """Raise StoreError unless `raw`, the end of an uncompressed shard, is exactly the index of `num_rows` rows."""
    _check_checksum(raw, where)
    if raw != _index(shape, [shape.chunk_bytes] * shape.num_present(num_rows)):
        raise StoreError(f"{where} does not have the layout of a kdpipe shard: its rows cannot be mapped.")


def _index(shape: ShardShape, lengths: list[int]) -> bytes:
    """Return the index and its checksum of a shard whose first chunks have `lengths` bytes; others are absent."""
    index = np.full((shape.num_chunks, 2), ABSENT, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]]) if lengths else []
    raw = index.tobytes()
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little")


def _packed_lengths(raw: bytes, shape: ShardShape, num_rows: int, where: str) -> list[int]:
    """Return the chunk lengths of a compressed shard: contiguous chunks that fill the file."""
    tail = raw[-shape.index_bytes :]
    _check_checksum(tail, where)
    present = shape.num_present(num_rows)
    if len(tail) == shape.index_bytes:
        lengths = [int(length) for length in np.frombuffer(tail[:-CRC_BYTES], "<u8").reshape(-1, 2)[:present, 1]]
        if sum(lengths) + shape.index_bytes == len(raw) and tail == _index(shape, lengths):
            return lengths
    raise StoreError(f"{where} does not have the layout of a kdpipe shard: its chunks are not contiguous.")


def _check_checksum(tail: bytes, where: str) -> None:
    body, checksum = tail[:-CRC_BYTES], int.from_bytes(tail[-CRC_BYTES:], "little")
    if crc32c(body) != checksum:
        raise StoreError(f"{where} is damaged: the checksum of its shard index differs.")


def _chunks(data: memoryview, padding: bytes, chunk_bytes: int) -> Iterator[bytes]:
    for start in range(0, len(data), chunk_bytes):
        chunk = bytes(data[start : start + chunk_bytes])
        yield chunk + padding if len(chunk) < chunk_bytes else chunk
