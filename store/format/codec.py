"""Compression of the archive profile: Zarr's own codecs, applied per chunk, with a checksum each.

Zstd includes a checksum; Blosc does not, so a crc32c follows it. Both are in the Zarr v3 specification: any Zarr
reader opens an archive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
from numcodecs import Blosc, Zstd

from kdpipe.store.errors import StoreError

CODECS = ("zstd", "blosc")


@dataclass(frozen=True)
class Codec:
    """Compression of an archive's chunks. `level` 1 to 9 costs time in writing, little in reading."""

    name: str = "zstd"
    level: int = 5

    def __post_init__(self) -> None:
        if self.name not in CODECS or type(self.level) is not int or not 1 <= self.level <= 9:
            raise ValueError(
                f"codec {self.name!r} at level {self.level!r} is not one of {', '.join(CODECS)} at levels 1 to 9"
            )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "level": self.level}

    def metadata(self, item_bytes: int) -> list[dict[str, Any]]:
        """Return its entries in an array's codec list, for numbers of `item_bytes`."""
        if self.name == "zstd":
            return [{"name": "zstd", "configuration": {"level": self.level, "checksum": True}}]
        blosc = {"typesize": item_bytes, "cname": "zstd", "clevel": self.level, "shuffle": "bitshuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]

    def encode(self, chunk: bytes, item_bytes: int) -> bytes:
        """Compress one chunk and add its checksum."""
        if self.name == "zstd":
            return bytes(Zstd(level=self.level, checksum=True).encode(chunk))
        blosc = Blosc(cname="zstd", clevel=self.level, shuffle=Blosc.BITSHUFFLE, typesize=item_bytes)
        packed = bytes(blosc.encode(chunk))
        return packed + bytes(google_crc32c.value(packed).to_bytes(4, "little"))

    def decode_into(self, raw: bytes, out: memoryview, where: str) -> None:
        """Decompress one chunk into `out`, which must have exactly its size. Raises StoreError where it is damaged.

        Nothing is allocated for sizes that an untrusted file merely claims.
        """
        try:
            if self.name == "blosc":
                raw = _checked_blosc(raw, out.nbytes)
                Blosc().decode(raw, out)
            else:
                _require_size(_zstd_bytes(raw), out.nbytes)
                Zstd().decode(raw, out)
        except (ValueError, RuntimeError, IndexError) as error:
            raise StoreError(f"{where} is damaged: a chunk cannot be decompressed ({error}).") from error


def codec_from_json(record: Any) -> Codec | None:
    """Parse a manifest's codec; None where chunks are not compressed. Raises ValueError if it is invalid."""
    if record is None:
        return None
    if not isinstance(record, Mapping) or set(record) != {"name", "level"}:
        raise ValueError(f"the codec is {record!r}")
    return Codec(record["name"], record["level"])


def _checked_blosc(raw: bytes, num_bytes: int) -> bytes:
    packed, checksum = raw[:-4], int.from_bytes(raw[-4:], "little")
    if len(packed) < 16 or google_crc32c.value(packed) != checksum:
        raise ValueError("its checksum differs")
    if int.from_bytes(packed[12:16], "little") != len(packed):  # Blosc trusts it, and would read beyond the buffer
        raise ValueError("it states another length than it has")
    _require_size(int.from_bytes(packed[4:8], "little"), num_bytes)
    return packed


def _zstd_bytes(raw: bytes) -> int:
    """Return the content size in a Zstandard frame header (RFC 8878, section 3.1.1.1)."""
    if raw[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is not a Zstandard frame")
    descriptor = raw[4]
    single = descriptor >> 5 & 1
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    flag = descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[flag]
    if not width or len(raw) < start + width:
        raise ValueError("its frame does not state its size")
    return int.from_bytes(raw[start : start + width], "little") + (256 if flag == 1 else 0)


def _require_size(stated: int, wanted: int) -> None:
    if stated != wanted:
        raise ValueError(f"it holds {stated:,} bytes instead of {wanted:,}")
