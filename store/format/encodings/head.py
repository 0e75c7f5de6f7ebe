"""The teacher's head: its last linear layer, kept once in a store, from which logits follow at any temperature.

It is one array `head/pre_logits`, float32 [C, D + 1]: the weights in the first D columns, the biases in the last, zeros
of a layer without. The logits of a row of `features/pre_logits` are its products with the weights plus the biases. The
manifest has its shape and a digest of its bytes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError, translate_os_errors
from kdpipe.store.fs.atomic_write import make_folders, sweep_partial, write_atomically
from kdpipe.store.fs.safe_read import read_regular_file

HEAD = "head/pre_logits"
HEAD_KEY = f"{HEAD}/c/0/0"
"""Its only chunk."""

MAX_HEAD_BYTES = 2**33

NOT_RECORDED = "its bytes are not those that the manifest records"


@dataclass(frozen=True)
class HeadRecord:
    """What a manifest says of the head: its shape (C, D + 1), and sha256 over its bytes, float32 little-endian."""

    shape: tuple[int, int]
    sha256: str

    @property
    def num_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "sha256": self.sha256}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> HeadRecord:
        """Parse a record. Raises ValueError and others where it is damaged."""
        shape, sha256 = record["shape"], record["sha256"]
        if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape) or shape[1] < 2:
            raise ValueError(f"the head has shape {str(shape)[:40]}")
        parsed = HeadRecord((shape[0], shape[1]), str(sha256))
        if parsed.num_bytes > MAX_HEAD_BYTES or not re.fullmatch("[0-9a-f]{64}", parsed.sha256):
            raise ValueError(f"the head is {str(record)[:120]}")
        return parsed


def head_record(head: NDArray[np.float32]) -> HeadRecord:
    """Return the record of a head [C, D + 1]."""
    return HeadRecord((head.shape[0], head.shape[1]), hashlib.sha256(head_bytes(head)).hexdigest())


def head_bytes(head: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(head, "<f4").tobytes()


def require_head(head: NDArray[np.float32] | None, record: HeadRecord | None, where: str) -> None:
    """Raise StoreError unless a head is given that a manifest's record describes, or neither."""
    if (None if head is None else head_record(head)) != record:
        raise StoreError(f"{where} would not have the head that its manifest records.")


def is_recorded(raw: bytes, record: HeadRecord) -> bool:
    """Return whether the bytes of a head are those that a manifest records."""
    return len(raw) == record.num_bytes and hashlib.sha256(raw).hexdigest() == record.sha256


def parse_head(raw: bytes | None, record: HeadRecord, where: str) -> NDArray[np.float32]:
    """Return the head [C, D + 1] in the bytes of its chunk. Raises StoreError where they are not those recorded."""
    if raw is None or not is_recorded(raw, record):
        fault = "it is missing" if raw is None else NOT_RECORDED
        raise StoreError(f"{where}/{HEAD_KEY} is damaged: {fault}. Run `kdpipe store repair RECIPE`.")
    return np.frombuffer(raw, "<f4").reshape(record.shape).astype(np.float32)


def read_head(path: Path, record: HeadRecord) -> NDArray[np.float32]:
    """Read the head [C, D + 1] of the store at `path`. Raises StoreError where it is damaged or missing."""
    with translate_os_errors(partial(_unreadable, path)):
        return parse_head(read_regular_file(path / HEAD_KEY, record.num_bytes, path), record, str(path))


def write_head(path: Path, head: NDArray[np.float32]) -> None:
    """Write the head of the store at `path`, atomically. The caller has the store's lock."""
    make_folders([(path / HEAD_KEY).parent])
    sweep_partial(path / HEAD_KEY)
    write_atomically(path / HEAD_KEY, head_bytes(head))


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path / HEAD_KEY} cannot be read ({error.strerror}): run `kdpipe store repair RECIPE`."


def head_logits(rows: NDArray[Any], head: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the logits [n, C], float32, of pooled vectors [n, D] with a head [C, D + 1], with sums in float64."""
    weight, bias = head[:, :-1].astype(np.float64), head[:, -1].astype(np.float64)
    return np.asarray(rows.astype(np.float64) @ weight.T + bias, np.float32)
