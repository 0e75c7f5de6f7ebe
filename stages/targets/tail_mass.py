"""The share of the teacher's probability that top-k logits leave to the classes that they do not keep.

Which of these have it is not stored: it is spread evenly over them. At a high temperature it is large, and even a
student equal to the teacher is charged for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.store import TargetStore, TopK, interpolation
from kdpipe.store.format.encodings.topk import TAIL

MEASURED_ROWS = 4096

MAX_TAIL_MASS = 0.2
"""The largest share about which there is no warning."""


@dataclass(frozen=True)
class TailMass:
    """The mean mass of the rest, over some rows, at a temperature of a loss."""

    loss: str
    temperature: float
    top_k: TopK
    mass: float

    @property
    def is_large(self) -> bool:
        return self.mass > MAX_TAIL_MASS

    def __str__(self) -> str:
        kept = f"the {self.top_k.k} of {self.top_k.num_classes:,} classes in the store"
        rest = f"the rest {100 * self.mass:.1f} %"
        text = f"{self.loss}: at T = {self.temperature:g} {kept} have {100 - 100 * self.mass:.1f} % of the teacher's"
        text = f"{text} probability, and {rest}"
        if not self.is_large:
            return text
        return (
            f"{text}, spread evenly, so that even a student equal to the teacher is charged: raise cache.top_k (into "
            "another store), lower the temperature, or set the loss's rest = 'student'."
        )


def tail_of(store: TargetStore) -> NDArray[Any]:
    """Return the tail of the first samples, [n, G], of a store with top-k logits."""
    rows, top_k = store.manifest.layout.sample_rows()[:MEASURED_ROWS], store.manifest.top_k
    assert top_k is not None
    names = [spec.name for spec in top_k.arrays("float16")]
    return top_k.unpack({name: store.take(name, 0, rows) for name in names})[TAIL]


def measure_tails(temperatures: Sequence[tuple[str, float]], top_k: TopK, tail: NDArray[Any]) -> Iterator[TailMass]:
    """Yield the mass at each of these temperatures of losses that the grid covers, over the rows of a tail [n, G]."""
    for loss, temperature in temperatures:
        if top_k.temperatures[0] <= temperature <= top_k.temperatures[-1]:
            log_odds = tail.astype(np.float64) @ interpolation(top_k, temperature)
            yield TailMass(loss, temperature, top_k, float((1 / (1 + np.exp(-log_odds))).mean()))


def report_tail(found: TailMass, stage: str, monitor: RunMonitor) -> None:
    """Report a mass, as a warning if it is large: one for all stages and variants of a run."""
    if found.is_large:
        monitor.warn_once(stage, str(found))
    else:
        monitor.report(ProgressEvent(stage, str(found), 1, 1, "loss"))
