"""Map many files into one contiguous address range, as one read-only array: the shards of a view without a copy.

Python's own `mmap` reserves and owns the range, so that when the last array over it is freed, one munmap drops the
reservation and every file mapped over it. The kernel keeps the files alive meanwhile: no descriptor stays open, a file
replaced by a rename keeps its old bytes here, and a forked child reads the same pages.
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

from kdpipe.store.errors import StoreError

MAP_FIXED = 0x10
"""From Linux's <sys/mman.h>: map at exactly this address, replacing existing maps."""

MAP_FAILED = ctypes.c_void_p(-1).value


class MappingUnsupported(Exception):
    """Mapping is not possible on this machine or file system. Reading into memory still works."""


@dataclass(frozen=True)
class FileRegion:
    """The first `num_bytes` bytes of the file `path`, mapped at byte `offset` of the range, a multiple of the page."""

    path: Path
    offset: int
    num_bytes: int


def map_files(regions: Sequence[FileRegion], range_bytes: int) -> NDArray[np.uint8]:
    """Map all `regions` into one read-only array, uint8 [range_bytes], unmapped when the last view of it is freed.

    Bytes outside of all regions are zeros, but the rest of a region's last page shows what follows in its file. Files
    may be replaced or deleted while mapped, but never truncated: access to missing bytes kills the process.

    Raises:
        MappingUnsupported: The regions cannot be mapped here. Nothing stays mapped then.
        StoreError: A file is absent or shorter than its region.
        ValueError: A region is outside of the range.
    """
    for region in regions:  # a fixed map outside of the range would silently replace other memory
        if region.offset < 0 or region.num_bytes < 0 or region.offset + region.num_bytes > range_bytes:
            raise ValueError(f"{region} is outside of a range of {range_bytes:,} bytes.")
    _require_able(regions)
    if not range_bytes:
        return np.frombuffer(b"", np.uint8)
    try:
        # Read-only private pages count against no memory limit, however long the range.
        reserved = mmap.mmap(-1, range_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    except (OSError, OverflowError) as error:
        raise MappingUnsupported(f"the system grants no address range of {range_bytes:,} bytes ({error})") from error
    try:
        address = np.frombuffer(reserved, np.uint8).ctypes.data
        for region in regions:
            _map_over(address, region)
    except BaseException:
        reserved.close()  # now, not when the traceback of the error is released
        raise
    return np.frombuffer(reserved, np.uint8)


def _require_able(regions: Sequence[FileRegion]) -> None:
    if (sys.platform, sys.byteorder) != ("linux", "little"):
        raise MappingUnsupported(
            f"one range for many files needs little-endian Linux: this is {sys.byteorder}, {sys.platform}"
        )
    for region in regions:
        if region.offset % mmap.PAGESIZE:
            raise MappingUnsupported(
                f"{region.path} would start at byte {region.offset:,}, inside a page of {mmap.PAGESIZE:,} bytes"
            )


def _map_over(address: int, region: FileRegion) -> None:
    """Map a region into the range at `address`. The caller ensures that it is inside."""
    try:
        descriptor = os.open(region.path, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{region.path} cannot be read: {error.strerror}.") from error
    try:
        found = os.fstat(descriptor).st_size
        if found < region.num_bytes:
            raise StoreError(f"{region.path} is damaged: it has {found:,} bytes, its rows take {region.num_bytes:,}.")
        if region.num_bytes and _libc_mmap(address + region.offset, region.num_bytes, descriptor) == MAP_FAILED:
            raise MappingUnsupported(f"{region.path} cannot be mapped: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def _libc_mmap(address: int, num_bytes: int, descriptor: int) -> int | None:
    """Call mmap(2) at a given address, which Python's `mmap` does not support."""
    libc = ctypes.CDLL(None, use_errno=True)
    number, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = pointer
    mapped: int | None = libc.mmap(address, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor, 0)
    return mapped
