"""Classes packed to as many bits as the last one of all has: 7 for 100 classes, 10 for 1,000."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def num_bits(num_classes: int) -> int:
    """Return the bits of a class."""
    return (num_classes - 1).bit_length()


def num_bytes(k: int, bits: int) -> int:
    """Return the bytes of k classes: the last one may have bits to spare."""
    return -(-k * bits // 8)


def pack_classes(classes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Pack classes [n, k], the lowest bit first, from the lowest bit of the first byte on: uint8 [n, num_bytes]."""
    of_class = (classes.astype(np.int64)[:, :, None] >> np.arange(bits)).astype(np.uint8) & 1
    return np.packbits(of_class.reshape(len(classes), -1), axis=1, bitorder="little")


def unpack_classes(packed: NDArray[np.uint8], k: int, bits: int) -> NDArray[np.int64]:
    """Return the classes [n, k] of packed rows [n, num_bytes]. Those of forged rows may be too large."""
    of_class = np.unpackbits(packed, axis=1, count=k * bits, bitorder="little").reshape(len(packed), k, bits)
    return np.asarray(of_class @ (np.int64(1) << np.arange(bits)))
