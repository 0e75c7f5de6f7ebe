"""Read the recorded latencies of a seed's files in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import RunError
from kdpipe.stages.training.job_dir import read_json_file

LatencyByBatch = dict[str, dict[str, float]]
"""By batch size, as text: a batch's median and 95th percentile, p50_ms and p95_ms."""


@dataclass(frozen=True)
class Latencies:
    """Latencies of each kind of network, on a CPU with a number of threads."""

    cpu: str
    num_threads: int
    batch_sizes: list[int]
    files: Mapping[str, LatencyByBatch]

    def of(self, kind: str, timed_as: str) -> LatencyByBatch | None:
        """Return a network's own latencies, or else those of the equivalent kind."""
        return self.files.get(kind, self.files.get(timed_as))


def latency_path(root: Path, seed: int) -> Path:
    return root / f"latency-seed{seed}.json"


def read_latencies(path: Path) -> Latencies | None:
    """Return the recorded latencies, or None. Raises RunError if the file is damaged."""
    record = read_json_file(path)
    if record is None:
        return None
    try:
        sizes, files = list(map(int, record["batch_sizes"])), dict(record["files"].items())
        found = Latencies(str(record["cpu"]), int(record["num_threads"]), sizes, files)
        times = [found.files[kind][str(size)] for kind in found.files for size in found.batch_sizes]
        figures: list[Any] = [pair[name] for pair in times for name in ("p50_ms", "p95_ms")]
        whole = all(isinstance(figure, float | int) and math.isfinite(figure) and figure > 0 for figure in figures)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise RunError(f"{path} is damaged ({error!r}): delete it, and run `kdpipe compress` again.") from error
    if not whole:
        raise RunError(
            f"{path} is damaged (a time is not a positive number): delete it, and run `kdpipe compress` again."
        )
    return found
