"""Many files behind one another in one address range, as one read-only array: the shards of a view without a copy.

Python's own `mmap` reserves the range and stays its owner, so that when the last array over it dies one munmap drops
the reservation and every file mapped over it. The kernel keeps the files alive meanwhile: no descriptor stays open,
a file replaced by a rename keeps its old bytes here, and a forked child reads the same pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError

MAP_FIXED = 0x10
"""From Linux's <sys/mman.h>: put the map at this very address, over whatever was mapped there."""

MAP_FAILED = ctypes.c_void_p(-1).value

SPARE_MAPS = 4096
"""Maps left to the rest of the process: its libraries, its threads, its allocator. Linux allows 65,530 in all."""


class MappingUnsupported(Exception):
    """This machine or file system cannot map the pieces; the text says why. ReadMode them into memory still works."""


@dataclass(frozen=True)
class FileRegion:
    """The first `num_bytes` bytes of the file `path`, to stand from byte `at` of the range: a multiple of the page."""

    path: Path
    at: int
    num_bytes: int


def map_files(pieces: Sequence[FileRegion], range_bytes: int) -> NDArray[np.uint8]:
    """All `pieces` in one read-only array, uint8 [range_bytes]; the maps go when the last view of it does.

    Bytes that no piece covers are zeros; only the rest of a piece's last page shows what follows in its file. Files
    may be replaced or deleted while mapped, but never cut short: to touch bytes that are gone kills the process.

    Raises MappingUnsupported where pieces cannot be mapped here, StoreError where a file is absent or shorter than its piece,
    ValueError for a piece outside the range. Nothing stays mapped then.
    """
    _require_room(pieces, range_bytes)
    _require_able(pieces)
    if not range_bytes:
        return np.frombuffer(b"", np.uint8)
    try:
        # Read-only private pages count against no memory limit, however long the range.
        reserved = mmap.mmap(-1, range_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    except (OSError, OverflowError) as error:
        raise MappingUnsupported(f"the system grants no address range of {range_bytes:,} bytes ({error})") from error
    try:
        address = np.frombuffer(reserved, np.uint8).ctypes.data
        for piece in pieces:
            _map_over(address, piece)
    except BaseException:
        reserved.close()  # now, not when the error's traceback lets go of it
        raise
    return np.frombuffer(reserved, np.uint8)


def _require_room(pieces: Sequence[FileRegion], range_bytes: int) -> None:
    """A fixed map outside of the range would replace memory of others without a word."""
    for piece in pieces:
        if piece.at < 0 or piece.num_bytes < 0 or piece.at + piece.num_bytes > range_bytes:
            raise ValueError(f"{piece} lies outside of a range of {range_bytes:,} bytes.")


def _require_able(pieces: Sequence[FileRegion]) -> None:
    if (sys.platform, sys.byteorder) != ("linux", "little"):
        raise MappingUnsupported(f"one range for many files needs little-endian Linux: this is {sys.byteorder}, {sys.platform}")
    for piece in pieces:
        if piece.at % mmap.PAGESIZE:
            raise MappingUnsupported(f"{piece.path} would start at byte {piece.at:,}, inside a page of {mmap.PAGESIZE:,} bytes")
    room = _maps_left()
    if len(pieces) > room:
        raise MappingUnsupported(f"{len(pieces):,} files, and the system's vm.max_map_count leaves room for {room:,} more maps")


def _maps_left() -> int:
    """How many more maps this process may have, but for the spare ones; plenty where /proc does not say."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with Path("/proc/self/maps").open("rb") as maps:
            in_use = sum(1 for _ in maps)
    except (OSError, ValueError):
        return sys.maxsize
    return max(0, limit - in_use - SPARE_MAPS)


def _map_over(address: int, piece: FileRegion) -> None:
    """Map a piece into the range that starts at `address`. The caller has made sure that it lies inside."""
    try:
        descriptor = os.open(piece.path, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{piece.path} cannot be read: {error.strerror}.") from error
    try:
        found = os.fstat(descriptor).st_size
        if found < piece.num_bytes:
            raise StoreError(f"{piece.path} is damaged: it has {found:,} bytes, its rows take {piece.num_bytes:,}.")
        if piece.num_bytes:
            _fixed_map(address + piece.at, piece.num_bytes, descriptor, piece.path)
    finally:
        os.close(descriptor)


def _fixed_map(address: int, num_bytes: int, descriptor: int, path: Path) -> None:
    """mmap(2) at a given address, which Python's `mmap` has no word for."""
    libc = ctypes.CDLL(None, use_errno=True)
    number, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = pointer
    if libc.mmap(address, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED:
        raise MappingUnsupported(f"{path} cannot be mapped: {os.strerror(ctypes.get_errno())}")
