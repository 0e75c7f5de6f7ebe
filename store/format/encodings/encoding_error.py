"""Encoding errors: sums and counts over the rows of a unit, merged over units and summarized for a report.

A measurement is a small JSON object of sums, counts and maxima, rounded to six digits: `merge` adds up those of many
units; `summarize_logits` and `summarize_features` turn the totals into reported figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.format.encodings.topk import INDICES, TAIL, VALUES, TopK, dense_logits

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
KL_ROWS = 512
"""Maximum number of rows per unit for the KL divergence, evenly spaced: it costs an exponential per class."""

NUM_DIGITS = 6

LARGEST_OF_PROBABILITIES = "largest_probability_error"
"""In place of `largest_error` for sampled labels, whose errors are those of the probabilities at T = 1."""

Decode = Callable[[NDArray[np.intp], float], NDArray[np.float32]]
"""(rows [m], temperature) -> logits [m, C] as a reader at that temperature decodes them."""


def all_finite(array: NDArray[Any]) -> bool:
    """Return whether all numbers are finite; integers are. Several times as fast as numpy's `isfinite` on float16.

    Infinity and NaN have the largest exponent, so that read as whole numbers they are the largest of their sign.
    """
    if array.dtype.kind != "f" or not array.size:
        return True
    signed, unsigned = (np.dtype(f"{kind}{array.dtype.itemsize}") for kind in "iu")
    infinity, minus_infinity = np.array([np.inf, -np.inf], array.dtype).view(unsigned)
    bits = np.ascontiguousarray(array)
    return bool(bits.view(signed).max() < infinity and bits.view(unsigned).max() < minus_infinity)


def measure_dense(exact: NDArray[np.float32], stored: NDArray[Any]) -> dict[str, Any]:
    """Measure the error of dense logits [n, C] in the precision of `stored` [n, C]. All must be finite."""
    decoded = stored.astype(np.float32)
    return _measure(exact, decoded.argmax(axis=1), decoded - exact, lambda rows, _: decoded[rows], TEMPERATURES)


def measure_topk(exact: NDArray[np.float32], encoded: Mapping[str, NDArray[Any]], top_k: TopK) -> dict[str, Any]:
    """Measure the error of logits [n, C] as top-k logits, at those TEMPERATURES that the grid covers.

    The largest error is over the kept logits: of the others only the total mass is stored.
    """
    parts = top_k.unpack(encoded)
    values, indices, tail = (parts[name] for name in (VALUES, INDICES, TAIL))
    classes = indices.astype(np.intp)
    top1 = np.where(values == values[:, :1], classes, top_k.num_classes).min(axis=1)  # as argmax breaks ties

    def decode(rows: NDArray[np.intp], temperature: float) -> NDArray[np.float32]:
        return dense_logits(values[rows], indices[rows], tail[rows], top_k, temperature)

    errors = values.astype(np.float32) - np.take_along_axis(exact, classes, axis=1)
    covered = [value for value in TEMPERATURES if top_k.temperatures[0] <= value <= top_k.temperatures[-1]]
    return _measure(exact, top1, errors, decode, covered)


def _measure(
    exact: NDArray[np.float32],
    top1: NDArray[np.intp],
    errors: NDArray[np.float32],
    decode: Decode,
    temperatures: Sequence[float],
) -> dict[str, Any]:
    rows = kl_rows(len(exact))
    kl = {f"{value:g}": row_kl(exact[rows], decode(rows, value), value).sum() for value in temperatures}
    return {
        "num_rows": len(exact),
        "kl_rows": len(rows),
        "kl": {name: _rounded(total) for name, total in kl.items()},
        "top1_flips": int(np.count_nonzero(top1 != exact.argmax(axis=1))),
        "largest_error": _rounded(np.abs(errors).max(initial=0.0)),
    }


def kl_rows(num_rows: int) -> NDArray[np.intp]:
    """Return at most KL_ROWS rows of a unit, evenly spaced from its first row on."""
    count = min(num_rows, KL_ROWS)
    return np.arange(count, dtype=np.intp) * num_rows // max(count, 1)


def row_kl(exact: NDArray[Any], decoded: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return KL(softmax(exact / T) || softmax(decoded / T)) [n] in nats, of logits [n, C]; in double precision."""
    log_p, log_q = _log_softmax(exact, temperature), _log_softmax(decoded, temperature)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1), np.float64)


def _log_softmax(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))


def measure_features(exact: NDArray[np.float32], stored: NDArray[Any]) -> dict[str, Any]:
    """Measure the error of features [n, ...] in the precision of `stored` [n, ...]. All must be finite."""
    errors = stored.astype(np.float32)
    errors -= exact
    return {
        "num_rows": len(exact),
        "largest_error": _rounded(max(errors.max(initial=0.0), -errors.min(initial=0.0))),
        "squared_error": _rounded(np.square(errors).sum(dtype=np.float64)),
        "squared": _rounded(np.square(exact).sum(dtype=np.float64)),
    }


def merge(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the measurements of several units, all of one kind, into totals."""
    totals: dict[str, Any] = {}
    for name in measurements[0] if measurements else ():
        found = [measurement[name] for measurement in measurements]
        if isinstance(found[0], Mapping):
            totals[name] = merge(found)
        else:
            total = max(found) if name.startswith("largest_") else math.fsum(found)
            totals[name] = int(total) if isinstance(found[0], int) else _rounded(total)
    return totals


def summarize_logits(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Return num_rows, the mean KL divergence per row at each temperature (nats), top1_flips and largest_error."""
    kl = {name: _rounded(total / max(totals["kl_rows"], 1)) for name, total in totals["kl"].items()}
    return {**{name: totals[name] for name in ("num_rows", "top1_flips", "largest_error")}, "kl": kl}


def summarize_features(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Return num_rows, the largest error and relative_rms, the root mean square of errors over that of features."""
    largest = LARGEST_OF_PROBABILITIES if LARGEST_OF_PROBABILITIES in totals else "largest_error"
    relative = math.sqrt(totals["squared_error"] / totals["squared"]) if totals["squared"] else 0.0
    return {**{name: totals[name] for name in ("num_rows", largest)}, "relative_rms": _rounded(relative)}


def _rounded(value: float) -> float:
    return float(f"{float(value):.{NUM_DIGITS}g}")
