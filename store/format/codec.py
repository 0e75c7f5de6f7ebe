"""The archive profile's compression: Zarr's own codecs, one chunk at a time, each chunk with a checksum.

Zstd checks itself; Blosc does not, so a crc32c follows it. Both are in the Zarr v3 specification: any Zarr reader
opens an archive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
from numcodecs import Blosc, Zstd

from store.errors import StoreError

CODECS = ("zstd", "blosc")


@dataclass(frozen=True)
class Codec:
    """How the chunks of an archive are compressed. `level` 1 to 9 costs time when writing, little when reading."""

    name: str = "zstd"
    level: int = 5

    def __post_init__(self) -> None:
        if self.name not in CODECS or type(self.level) is not int or not 1 <= self.level <= 9:
            raise ValueError(
                f"the codec {self.name!r} at level {self.level!r}: known are {', '.join(CODECS)}, levels 1 to 9"
            )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "level": self.level}

    def metadata(self, item_bytes: int) -> list[dict[str, Any]]:
        """Its entries in an array's list of codecs, for numbers of `item_bytes`."""
        if self.name == "zstd":
            return [{"name": "zstd", "configuration": {"level": self.level, "checksum": True}}]
        blosc = {"typesize": item_bytes, "cname": "zstd", "clevel": self.level, "shuffle": "bitshuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]

    def encode(self, chunk: bytes, item_bytes: int) -> bytes:
        """One chunk, compressed, with its checksum."""
        if self.name == "zstd":
            return bytes(Zstd(level=self.level, checksum=True).encode(chunk))
        blosc = Blosc(cname="zstd", clevel=self.level, shuffle=Blosc.BITSHUFFLE, typesize=item_bytes)
        packed = bytes(blosc.encode(chunk))
        return packed + bytes(google_crc32c.value(packed).to_bytes(4, "little"))

    def decode_into(self, raw: bytes, out: memoryview, where: str) -> None:
        """Unpack one chunk into `out`, which must be just its size. Raises StoreError where it is damaged.

        Nothing is allocated for what a foreign file only claims to hold.
        """
        try:
            if self.name == "blosc":
                raw = _checked_blosc(raw, out.nbytes)
                Blosc().decode(raw, out)
            else:
                _require_size(_zstd_bytes(raw), out.nbytes)
                Zstd().decode(raw, out)
        except (ValueError, RuntimeError, IndexError) as error:
            raise StoreError(f"{where} is damaged: a chunk does not unpack ({error}).") from error


def codec_from_json(record: Any) -> Codec | None:
    """The codec of a manifest; None where chunks are stored as they are. Raises ValueError for a foreign one."""
    if record is None:
        return None
    if not isinstance(record, Mapping) or set(record) != {"name", "level"}:
        raise ValueError(f"the codec is {record!r}")
    return Codec(record["name"], record["level"])


def _checked_blosc(raw: bytes, num_bytes: int) -> bytes:
    packed, checksum = raw[:-4], int.from_bytes(raw[-4:], "little")
    if len(packed) < 16 or google_crc32c.value(packed) != checksum:
        raise ValueError("its checksum differs")
    if int.from_bytes(packed[12:16], "little") != len(packed):  # Blosc trusts it, and would read what lies behind
        raise ValueError("it states another length than it has")
    _require_size(int.from_bytes(packed[4:8], "little"), num_bytes)
    return packed


def _zstd_bytes(raw: bytes) -> int:
    """The size that a Zstandard frame's header states (RFC 8878, section 3.1.1.1)."""
    if raw[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is no Zstandard frame")
    descriptor = raw[4]
    single = descriptor >> 5 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    flag = descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[flag]
    if not width or len(raw) < at + width:
        raise ValueError("its frame does not say how much it holds")
    return int.from_bytes(raw[at : at + width], "little") + (256 if flag == 1 else 0)


def _require_size(stated: int, wanted: int) -> None:
    if stated != wanted:
        raise ValueError(f"it holds {stated:,} bytes instead of {wanted:,}")
