"""Read the recorded latencies of a seed's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdpipe.stages.errors import RunError
from kdpipe.stages.faults import fault_sentence
from kdpipe.stages.training.job_dir import read_json_file

LatencyByBatch = dict[str, dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]]
"""By batch size, as text: a batch's median and 95th percentile, p50_ms and p95_ms."""


@dataclass(frozen=True)
class Latencies:
    """Latencies of each kind of network, on a CPU with a number of threads."""

    cpu: str
    num_threads: int
    batch_sizes: list[int]
    files: dict[str, LatencyByBatch]

    def of(self, kind: str, timed_as: str) -> LatencyByBatch | None:
        """Return a network's own latencies, or else those of the equivalent kind."""
        return self.files.get(kind, self.files.get(timed_as))


def timed_in(kind: str, target: str) -> str:
    """Return the name under which a network's time in another runtime than onnxruntime is recorded."""
    return f"{kind} in {target}"


def latency_path(root: Path, seed: int) -> Path:
    return root / f"latency-seed{seed}.json"


def read_latencies(path: Path) -> Latencies | None:
    """Return the recorded latencies, or None. Raises RunError if the file is damaged."""
    record = read_json_file(path)
    if record is None:
        return None
    try:
        return TypeAdapter(Latencies).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        raise RunError(
            f"{path} is damaged ({place}: {fault_sentence(first)}): delete it, and run `kdpipe compress` again."
        ) from error
