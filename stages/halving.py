"""Running a network over a batch that does not fit into memory: in halves, in halves of these, down to one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stages.machine.memory import is_out_of_memory

T = TypeVar("T")

_sizes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many samples at once fit, of networks of which more did not: what was learned once holds for the next batch."""


def in_parts(
    model: nn.Module, num_rows: int, run: Callable[[slice], T], tell: Callable[[str], None] | None = None
) -> Iterator[T]:
    """What `run` gives for the rows of a batch: for all at once, or, part by part, for as many as fit into memory.

    Only for what asks of each row alone, as a network in eval mode: parts then differ from the whole by rounding. A
    part that does not fit is halved, and `model` is run on no more than that from then on; `tell` is told so in a
    sentence. Raises what `run` raises, and where not even one row fits, that it is out of memory.
    """
    start, tried = 0, min(num_rows, _sizes.get(model, num_rows))
    size = tried
    while start < num_rows:
        stop = min(start + size, num_rows)
        found = _attempt(run, slice(start, stop))
        if found is None:
            size = (stop - start + 1) // 2
            continue
        if size < tried:
            _sizes[model] = size
            if tell is not None:
                tell(f"out of memory with batches of {tried}: going on with {size}.")
            tried = size
        yield found[0]
        start = stop


def _attempt(run: Callable[[slice], T], rows: slice) -> tuple[T] | None:
    """What `run` gives for `rows`; None where that does not fit into memory and could still be halved."""
    try:
        return (run(rows),)
    except (RuntimeError, MemoryError) as error:
        if rows.stop - rows.start <= 1 or not is_out_of_memory(error):
            raise
    # Only here: as long as the error is at hand, its traceback keeps alive what the attempt had computed.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return None
