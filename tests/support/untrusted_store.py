"""Stores to change, and what comes of reading them."""

from __future__ import annotations

import json
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kdpipe.store import Codec, FingerprintMismatch, StoreError, open_store
from support.many_stores import LOGITS, Wish, first_difference

WISH = Wish(LOGITS["float16"], num_samples=900)
WISHES = {
    "dense": WISH,
    "top-k": replace(WISH, form=LOGITS["top-k"]),
    "zstd": replace(WISH, form=replace(WISH.form, codec=Codec("zstd", 1))),
    "blosc": replace(WISH, form=replace(WISH.form, codec=Codec("blosc", 1))),
}
DEFAULT_MAX_BYTES = 50_000_000
"""The store itself has 0.4 MB."""

LONGEST_S = 20


@contextmanager
def guarded() -> Iterator[None]:
    """Fail if the block hangs or takes much memory."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it hangs: nothing came within {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_S)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < DEFAULT_MAX_BYTES
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path) -> str:
    """Read everything: return the error message, or "" if all numbers are right. Anything else fails."""
    with guarded():
        try:
            for way in (open_store(path), open_store(path).streamed(1)):
                assert first_difference(way) is None
                assert all(isinstance(name, str) for name in (*way.classes, *way.layers))
                assert way.num_classes > 0
                json.dumps([way.provenance, dict(way.fidelity), repr(way)])
        except (StoreError, FingerprintMismatch) as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
            return str(error)
    return ""
