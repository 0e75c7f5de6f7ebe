"""The encodings of logits in one registry: what a store has in place of an array of all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.format.encodings.encoding_error import (
    LARGEST_OF_PROBABILITIES,
    measure_dense,
    measure_features,
    measure_topk,
)
from kdpipe.store.format.encodings.quantized import BITS, Quantized
from kdpipe.store.format.encodings.sampled import Sampled, probabilities
from kdpipe.store.format.encodings.topk import TopK

LogitEncoding = TopK | Quantized | Sampled

_PARSERS: dict[str, Callable[[Mapping[str, Any]], LogitEncoding]] = {
    **dict.fromkeys(BITS, Quantized.from_json),
    Sampled.name: Sampled.from_json,
}
"""By the name in a manifest's `encoding`; top-k logits have the key `top_k`."""


def encoding_json(encoding: LogitEncoding | None) -> dict[str, Any]:
    """Return the manifest's entries: `top_k`, and `encoding` where it is another."""
    top_k = encoding.to_json() if isinstance(encoding, TopK) else None
    return {"top_k": top_k, **({"encoding": encoding.to_json()} if encoding and not top_k else {})}


def parse_encoding(manifest: Mapping[str, Any]) -> LogitEncoding | None:
    """Parse these entries; None for dense logits. Raises TypeError, ValueError or KeyError where they are invalid."""
    if manifest["top_k"] is not None:
        return TopK.from_json(manifest["top_k"])
    record = manifest.get("encoding")
    if record is None:
        return None
    if not isinstance(record, Mapping) or record["name"] not in _PARSERS:
        raise ValueError(f"the encoding of the logits is {str(record)[:80]}")
    return _PARSERS[record["name"]](record)


def measure_encoded(
    exact: NDArray[np.float32], encoded: Mapping[str, NDArray[Any]], encoding: LogitEncoding
) -> dict[str, Any]:
    """Measure the error of logits [n, C] in an encoding; of sampled labels, the error of the probabilities at T = 1."""
    if isinstance(encoding, TopK):
        return measure_topk(exact, encoded, encoding)
    if isinstance(encoding, Sampled):
        decoded = probabilities(encoding.decode(encoded)).astype(np.float32)
        measured = measure_features(probabilities(exact).astype(np.float32), decoded)
        return {LARGEST_OF_PROBABILITIES if name == "largest_error" else name: one for name, one in measured.items()}
    return measure_dense(exact, encoding.decode(encoded))
