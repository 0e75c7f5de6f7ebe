"""Compare the encodings of a teacher's logits: bytes, fidelity for these losses, speed; and the one to choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.distillation.compatibility import require_encoding
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.schedules import bounds
from kdpipe.stages.targets.outputs import head_logits, teacher_targets
from kdpipe.store import StoreError, TopK, default_temperatures
from kdpipe.store.format.encodings.encoding_error import row_kl
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import BITS, Quantized
from kdpipe.store.format.encodings.sampled import Sampled, probabilities

MAX_ROWS, MAX_VALUES = 2048, 2**22
"""Rows and logits that are compared, at most."""

KEPT = (5, 10, 20, 50, 100, 200)
SAMPLED = (12, 25, 50)

BATCH_ROWS = 256
TIMED_S = 0.1


@dataclass(frozen=True)
class EncodingReport:
    """An encoding, measured on a teacher's logits.

    Attributes:
        name: As in `kdpipe store info`.
        key: The recipe's key that chooses it.
        row_bytes: Bytes of the logits of a sample in a view.
        kl: By temperature, the mean KL divergence from the exact soft labels, in nats; of sampled labels none.
        flips: The share of rows with another largest class.
        gradient_cosine: By temperature, the mean cosine of a batch's gradient to that with the exact soft labels: of
            the weights of a linear student, whose inputs are the teacher's logits and whose outputs half of these.
        rows_per_s: Gathered from memory in batches of 256 and decoded, on this machine.
        refusal: Why a loss refuses it; empty if none does.
    """

    name: str
    key: str
    row_bytes: int
    kl: dict[str, float]
    flips: float
    gradient_cosine: dict[str, float]
    rows_per_s: float
    refusal: str

    def max_kl(self) -> float:
        return max(self.kl.values(), default=float("inf"))


def num_compared(num_classes: int) -> int:
    """Return the number of rows to compare."""
    return max(2, min(MAX_ROWS, MAX_VALUES // num_classes))


def compare_encodings(
    exact: NDArray[np.float32], losses: Sequence[tuple[str, Loss]], seed: int = 0
) -> list[EncodingReport]:
    """Measure each encoding on a teacher's logits [n, C], for losses on logits by the name of their entry."""
    temperatures = temperatures_of(losses)
    return [
        _report(exact, encoding, key, losses, temperatures)
        for encoding, key in _candidates(exact.shape[1], temperatures, seed)
    ]


def temperatures_of(losses: Sequence[tuple[str, Loss]]) -> list[float]:
    """Return the temperatures of losses, ascending."""
    wanted = {value for _, loss in losses for one in loss.temperatures() for value in bounds(one)}
    return sorted(wanted) or [1.0]


def recommended(reports: Sequence[EncodingReport], max_kl: float) -> EncodingReport:
    """Return the encoding of fewest bytes that no loss refuses and whose KL divergence is at most `max_kl` nats.

    Where none is within it, the one that is nearest.
    """
    accepted = [one for one in reports if not one.refusal and one.kl]
    faithful = [one for one in accepted if one.max_kl() <= max_kl]
    return min(faithful, key=lambda one: one.row_bytes) if faithful else min(accepted, key=EncodingReport.max_kl)


def _candidates(
    num_classes: int, temperatures: Sequence[float], seed: int
) -> Iterator[tuple[LogitEncoding | None, str]]:
    """Yield encodings with the keys that choose them; None is float16."""
    yield None, "cache.dtype = 'float16'"
    for name in BITS:
        yield Quantized(name, num_classes), f"cache.encoding = '{name}'"
    grid = default_temperatures(min(1.0, *temperatures), max(1.0, *temperatures))
    for k in KEPT:
        top_k = TopK(num_classes, k, grid) if k < num_classes else None
        if top_k and sum(spec.row_bytes for spec in top_k.arrays("float16")) < 2 * num_classes:
            yield top_k, f"cache.top_k = {k}, cache.temperatures = [{grid[0]:g}, {grid[-1]:g}]"
    for k in SAMPLED:
        if 2 * k < num_classes:
            yield Sampled(num_classes, k, seed), f"cache.sampled_labels = {k}"


def _report(
    exact: NDArray[np.float32],
    encoding: LogitEncoding | None,
    key: str,
    losses: Sequence[tuple[str, Loss]],
    temperatures: Sequence[float],
) -> EncodingReport:
    ids = np.arange(len(exact), dtype=np.int64)
    rows = encoding.encode(exact, "float16", ids, 0) if encoding else {"logits": exact.astype(np.float16)}
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    is_sampled = isinstance(encoding, Sampled)

    def decode(rows: Mapping[str, Tensor], temperature: float) -> Tensor:
        return teacher_targets(encoding, rows, {}).logits_at(temperature)

    return _measured(
        exact,
        tensors,
        decode,
        [1.0] if is_sampled else temperatures,
        name="float16" if encoding is None else _name(encoding),
        key=key,
        refusal=_refusal(encoding, losses),
        has_kl=not is_sampled,
    )


def report_head(
    exact: NDArray[np.float32],
    vectors: NDArray[np.float32],
    head: NDArray[np.float32],
    losses: Sequence[tuple[str, Loss]],
) -> EncodingReport:
    """Measure the head encoding on logits [n, C], of the vectors [n, D] before a head [C, D + 1]: all losses accept it.

    The bytes of the head, which is stored once, are not those of a row.
    """
    weights = torch.from_numpy(head)

    def decode(rows: Mapping[str, Tensor], temperature: float) -> Tensor:
        return head_logits(rows["vectors"].float(), weights)

    tensors = {"vectors": torch.from_numpy(vectors).half()}
    return _measured(exact, tensors, decode, temperatures_of(losses), name="head", key="cache.encoding = 'head'")


def _measured(
    exact: NDArray[np.float32],
    tensors: dict[str, Tensor],
    decode: Callable[[Mapping[str, Tensor], float], Tensor],
    temperatures: Sequence[float],
    *,
    name: str,
    key: str,
    refusal: str = "",
    has_kl: bool = True,
) -> EncodingReport:
    decoded = {value: decode(tensors, value).numpy() for value in temperatures}
    top1 = next(iter(decoded.values())).argmax(axis=1)
    return EncodingReport(
        name=name,
        key=key,
        row_bytes=sum(rows[0].nbytes for rows in tensors.values()),
        kl={f"{t:g}": float(row_kl(exact, found, t).mean()) for t, found in decoded.items()} if has_kl else {},
        flips=float((top1 != exact.argmax(axis=1)).mean()),
        gradient_cosine={f"{t:g}": gradient_cosine(exact, found, t) for t, found in decoded.items()},
        rows_per_s=_rate(tensors, lambda rows: decode(rows, temperatures[0])),
        refusal=refusal,
    )


def _name(encoding: LogitEncoding) -> str:
    return encoding.name if isinstance(encoding, Quantized) else f"{encoding.name}, {encoding.k}"


def _refusal(encoding: LogitEncoding | None, losses: Sequence[tuple[str, Loss]]) -> str:
    for entry, loss in losses:
        try:
            require_encoding(encoding, "the store", loss, loss.temperatures(), entry)
        except (RecipeError, StoreError) as error:
            return str(error)
    return ""


def gradient_cosine(exact: NDArray[np.float32], decoded: NDArray[np.float32], temperature: float) -> float:
    """Return the mean cosine, over batches, of the gradients of KD [C, C] of the weights of a linear student.

    Its inputs and twice its outputs are the exact logits [n, C]. A batch's gradient is X' E, with the errors E =
    student - teacher; the products of two such gradients are those of the errors and of the inputs.
    """
    student = probabilities(exact / np.float32(2 * temperature))
    errors = [student - probabilities(logits / np.float32(temperature)) for logits in (exact, decoded)]
    cosines = []
    for start in range(0, max(1, len(exact) - BATCH_ROWS + 1), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        inputs = exact[rows].astype(np.float64) @ exact[rows].T
        right, found = errors[0][rows], errors[1][rows]
        product, own, other = (
            float((a @ b.T * inputs).sum()) for a, b in ((right, found), (right, right), (found, found))
        )
        cosines.append(product / max((own * other) ** 0.5, 1e-300))
    return float(np.mean(cosines))


def _rate(tensors: dict[str, Tensor], decode: Callable[[Mapping[str, Tensor]], Tensor]) -> float:
    """Return the rows per second that are gathered from memory and decoded."""
    num_rows = len(next(iter(tensors.values())))
    index = torch.randint(num_rows, (BATCH_ROWS,), generator=torch.Generator().manual_seed(0))
    count, started, wall_s = 0, time.perf_counter(), 0.0
    while wall_s < TIMED_S:
        rows = {name: values.index_select(0, index) for name, values in tensors.items()}
        decode(rows)
        count, wall_s = count + BATCH_ROWS, time.perf_counter() - started
    return count / wall_s


def advice_json(reports: Sequence[EncodingReport], max_kl: float) -> dict[str, Any]:
    """Return the reports as a JSON document, with the name of the recommended one."""
    return {
        "max_kl": max_kl,
        "recommended": recommended(reports, max_kl).name,
        "encodings": [{**vars(one), "rows_per_s": round(one.rows_per_s)} for one in reports],
    }
