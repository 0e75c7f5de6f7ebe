"""Compare encodings of a teacher's logits: bytes per row, KL divergence, and changed top-1 classes.

    uv run python benchmarks/encodings.py --logits FILE.npy [--highest T]

FILE contains float32 logits [N, C] of a trained teacher. Prints a Markdown table: the mean KL(exact || decoded) over
all rows in nats, at each temperature; and the number of rows whose largest class changes. Every top-k encoding is
followed by the common layout of other tools, with as many classes as fit in the same bytes: 4K + 4 bytes per row, the
teacher's K largest probabilities at T = 1 (half precision), their indices (int16), a seed (4 bytes), the rest spread
evenly. Its reader raises the probabilities to 1/T for another temperature. Probabilities that underflow to zero in
half precision count as the smallest half, otherwise the divergence would be infinite. kdpipe's tail takes 2 bytes per
temperature of its grid: 36 per row for 1 to 20, 20 for 1 to 4 (`--highest 4`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from kdpipe.store.format.encodings.encoding_error import TEMPERATURES, row_kl
from kdpipe.store.format.encodings.quantized import BITS, Quantized
from kdpipe.store.format.encodings.sampled import Sampled, probabilities
from kdpipe.store.format.encodings.topk import (
    INDICES,
    TAIL,
    VALUES,
    TopK,
    default_temperatures,
    dense_logits,
    encode_topk,
)

Logits = NDArray[np.float32]

KEPT = (5, 10, 20, 50)
HALF_MANTISSA_BITS = 10
SMALLEST_HALF = 2.0**-24
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Encoding:
    """An encoding; `decode` returns the logits [m, C] of some rows as a reader at a temperature gets them."""

    name: str
    row_bytes: float
    decode: Callable[[slice, float], Logits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True, help="a .npy file, float32 [N, C]")
    parser.add_argument("--highest", type=float, default=20.0, help="the highest temperature of the grid (20)")
    arguments = parser.parse_args()
    exact = np.load(arguments.logits, allow_pickle=False)
    if exact.ndim != 2 or exact.dtype != np.float32:
        parser.error(f"the logits are {exact.dtype} {list(exact.shape)}, expected float32 [N, C]")
    temperatures = [value for value in TEMPERATURES if value <= arguments.highest]
    print(f"{exact.shape[0]:,} rows of {exact.shape[1]} classes\n")
    print("| encoding | bytes a row |", *(f"KL, T = {value:g} |" for value in temperatures), "top-1 flips |")
    print("|---|" + "---:|" * (len(temperatures) + 2))
    grid = default_temperatures(1.0, arguments.highest)
    for encoding in (*dense_encodings(exact), *quantized_encodings(exact), *topk_encodings(exact, grid)):
        print(table_row(encoding, exact, temperatures), flush=True)
    print("\n| labels at T = 1 | bytes a row | angle of the gradient, degrees |\n|---|---:|---:|")
    for row in sampled_labels(exact):
        print(row, flush=True)


def table_row(encoding: Encoding, exact: Logits, temperatures: Sequence[float]) -> str:
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(exact), BLOCK_ROWS)]
    flips = sum(np.count_nonzero(encoding.decode(b, 1.0).argmax(axis=1) != exact[b].argmax(axis=1)) for b in blocks)
    totals = [sum(row_kl(exact[b], encoding.decode(b, T), T).sum() for b in blocks) for T in temperatures]
    divergences = " | ".join(f"{total / len(exact):.1e}" for total in totals)
    return f"| {encoding.name} | {encoding.row_bytes:.0f} | {divergences} | {flips} |"


def dense_encodings(exact: Logits) -> Iterator[Encoding]:
    half = exact.astype(np.float16)
    yield dense("float32", exact, exact.nbytes)
    yield dense("float16", half, half.nbytes)
    yield dense("float16, Zstd", half, zstd_bytes(half))
    for keepbits in (7, 5):
        rounded = bit_round(half, keepbits)
        yield dense(f"float16, BitRound {keepbits}, Zstd", rounded, zstd_bytes(rounded))


def dense(name: str, stored: NDArray[Any], num_bytes: int) -> Encoding:
    return Encoding(name, num_bytes / len(stored), lambda rows, _: stored[rows].astype(np.float32))


def zstd_bytes(stored: NDArray[Any]) -> int:
    codec = Zstd(level=3)
    return sum(len(codec.encode(stored[start : start + BLOCK_ROWS])) for start in range(0, len(stored), BLOCK_ROWS))


def bit_round(half: NDArray[np.float16], keepbits: int) -> NDArray[np.float16]:
    """Round half precision to `keepbits` bits of its mantissa, to nearest, ties to even."""
    dropped = HALF_MANTISSA_BITS - keepbits
    bits = half.view(np.uint16).astype(np.uint32)
    bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return (bits >> dropped << dropped).astype(np.uint16).view(np.float16)


def quantized_encodings(exact: Logits) -> Iterator[Encoding]:
    """Yield kdpipe's, then with even steps of the range, which take the same bytes."""
    ids = np.arange(len(exact))
    for name, bits in BITS.items():
        encoding = Quantized(name, exact.shape[1])
        decoded = encoding.decode(encoding.encode(exact, "float16", ids, 0))
        row_bytes = encoding.arrays("float16")[0].row_bytes
        yield dense(name, decoded, row_bytes * len(exact))
        largest, smallest = exact.max(axis=1, keepdims=True), exact.min(axis=1, keepdims=True)
        step = (largest - smallest) / (2**bits - 1)
        yield dense(f"({name}, even steps)", largest - step * np.rint((largest - exact) / step), row_bytes * len(exact))


def sampled_labels(exact: Logits) -> Iterator[str]:
    """Yield the rows of a table of sampled labels, whose divergence at one view says nothing.

    Each is compared by the gradient of KD at T = 1 of a linear student, whose inputs are the teacher's logits and
    whose outputs are half of these: the angle of a batch's gradient of the weights to that with all probabilities.
    """
    labels, num_classes = probabilities(exact), exact.shape[1]
    for k in (8, 12, 25, 50):
        if k < num_classes:
            sampled = Sampled(num_classes, k, 0)
            rows = probabilities(sampled.decode(sampled.encode(exact, "float16", np.arange(len(exact)), 0)))
            num_bytes = sum(spec.row_bytes for spec in sampled.arrays("float16"))
            yield f"| {k} sampled labels | {num_bytes} | {gradient_angle(exact, labels, rows):.1f} |"
            kept = np.where(labels >= np.sort(labels, axis=1)[:, -k, None], labels, 0)
            kept /= kept.sum(axis=1, keepdims=True)
            yield f"| (top-{k} probabilities, rest dropped) | {num_bytes} | {gradient_angle(exact, labels, kept):.1f} |"
            draws = 8 * num_bytes // sampled.bits
            counts = np.random.default_rng(0).multinomial(draws, labels) / draws
            yield f"| ({draws} independent draws) | {num_bytes} | {gradient_angle(exact, labels, counts):.1f} |"


def gradient_angle(exact: Logits, labels: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Return the mean angle in degrees, over batches of 256 rows, of the gradients with these probabilities [N, C]."""
    student, cosines = probabilities(exact / 2), []
    for start in range(0, len(exact) - 255, 256):
        rows = slice(start, start + 256)
        ours, right = ((student[rows] - one[rows]).T @ exact[rows] for one in (found, labels))
        cosines.append((ours * right).sum() / np.sqrt((ours**2).sum() * (right**2).sum()))
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def topk_encodings(exact: Logits, grid: tuple[float, ...]) -> Iterator[Encoding]:
    num_classes = exact.shape[1]
    for k in KEPT:
        if k < num_classes:
            encoding = topk(exact, TopK(num_classes, k, grid))
            yield encoding
            yield topk_probabilities(exact, min(num_classes - 1, (int(encoding.row_bytes) - 4) // 4))


def topk(exact: Logits, form: TopK) -> Encoding:
    encoded = encode_topk(exact, form, "float16")

    def decode(rows: slice, temperature: float) -> Logits:
        return dense_logits(encoded[VALUES][rows], encoded[INDICES][rows], encoded[TAIL][rows], form, temperature)

    return Encoding(f"top-{form.k} logits", sum(spec.row_bytes for spec in form.arrays("float16")), decode)


def topk_probabilities(exact: Logits, k: int) -> Encoding:
    """Return the layout of other tools, whose reader raises the probabilities to 1/T: log p / T as logits."""
    shifted = exact.astype(np.float64) - exact.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    indices = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(probabilities, indices, axis=1).astype(np.float16).astype(np.float64)

    def decode(rows: slice, _: float) -> Logits:
        rest = np.maximum(1.0 - kept[rows].sum(axis=1, keepdims=True), 0.0) / (exact.shape[1] - k)
        dense = np.repeat(rest, exact.shape[1], axis=1)
        np.put_along_axis(dense, indices[rows], kept[rows], axis=1)
        return np.asarray(np.log(np.maximum(dense, SMALLEST_HALF)), np.float32)

    return Encoding(f"(top-{k} probabilities)", 4 * k + 4, decode)


if __name__ == "__main__":
    main()
