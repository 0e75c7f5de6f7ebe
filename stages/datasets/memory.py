"""Refuse pixels that cannot fit this machine's memory, before the kernel kills the job without a word."""

from __future__ import annotations

import os

from stages.errors import DataError

_GIB = 2**30


def check_fits_memory(num_bytes: int, what: str) -> None:
    """DataError if `num_bytes` is more than the memory of this machine (not: than what is free of it now)."""
    installed = _installed_bytes()
    if installed is not None and num_bytes > installed:
        raise DataError(
            f"{what} needs {num_bytes / _GIB:.1f} GiB of memory, this machine has {installed / _GIB:.1f} GiB: "
            "set a smaller data.image_size or data.num_train, or, for imagefolder:PATH, data.held_bytes."
        )


def _installed_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system can say
        return None
