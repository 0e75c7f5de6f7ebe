"""Memory: how much there is, retaining what tensors free, and retrying with halved batches when it runs out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import psutil

from kdpipe.stages.runtime.cpu import cgroup_dirs

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's <malloc.h>."""

OUT_OF_MEMORY = (
    *("can't allocate memory", "out of memory", "not enough memory"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED", "nable to find an engine to", "nable to find a valid cuDNN algorithm"),
    "Failed to allocate",
)
"""Parts of the messages of errors: of torch's CPU allocators and CUDA; of cuBLAS and cuDNN, whose status it may be, or
that no algorithm's workspace was to be had; of onnxruntime."""

_sizes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The number of samples that fit at once, for networks with which a whole batch did not: it holds for later batches."""


def installed_bytes() -> int:
    """Return the bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)


def available_bytes() -> int:
    """Return the bytes of memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the lowest limit of this process's control groups (version 2), if it is below the installed memory."""
    limits = [installed_bytes()]
    for folder in cgroup_dirs(root):
        with suppress(OSError, ValueError):
            limits.append(int((folder / "memory.max").read_text()))
    return min(limits) if min(limits) < limits[0] else None


def free_gpu_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process may still take: within its share, `gpu_memory_fraction`."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free, allowed - torch.cuda.memory_reserved(device)))


def disable_malloc_trim() -> bool:
    """Let the allocator retain what tensors free, for the next step to reuse.

    By default glibc returns every large block to the kernel and faults it in again, page by page, a step later: on a
    CPU that can take half of a forward pass (benchmarks/freed_memory.py). The process's memory then stays at its peak.
    With other allocators this does nothing. Returns whether the allocator accepted it.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's, CUDA's (torch.OutOfMemoryError, a RuntimeError), or the allocator's."""
    if isinstance(error, MemoryError):
        return True
    is_library_error = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return is_library_error and any(text in str(error) for text in OUT_OF_MEMORY)


def run_in_chunks(
    model: nn.Module, num_rows: int, run: Callable[[slice], T], warn: Callable[[str], None] | None = None
) -> Iterator[T]:
    """Yield the results of `run` over the rows of a batch, in as few chunks as fit into memory.

    A chunk that does not fit is halved, and `model` is run on no more rows than that from then on. Use it only for work
    on independent rows, such as a network in eval mode: results then differ from those of the whole by rounding.

    `warn` receives a sentence each time that the chunks become smaller. Raises the out-of-memory error if not even one
    row fits, and other errors of `run`.
    """
    start, tried = 0, min(num_rows, _sizes.get(model, num_rows))
    size = tried
    while start < num_rows:
        stop = min(start + size, num_rows)
        result = _attempt(run, slice(start, stop))
        if result is None:
            size = (stop - start + 1) // 2
            continue
        if size < tried:
            _sizes[model] = size
            if warn is not None:
                warn(f"out of memory with batches of {tried}: continuing with {size}.")
            tried = size
        yield result[0]
        start = stop


def _attempt(run: Callable[[slice], T], rows: slice) -> tuple[T] | None:
    """Return the result of `run`; None where the rows do not fit into memory and can still be halved."""
    import torch

    try:
        return (run(rows),)
    except Exception as error:
        if rows.stop - rows.start <= 1 or not is_out_of_memory(error):
            raise
    # Not inside `except`: the error's traceback keeps the attempt's tensors alive.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return None
