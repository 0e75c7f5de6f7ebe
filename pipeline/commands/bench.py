"""Measure the latency of ONNX files on this machine's CPU, relative to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from kdpipe.pipeline.terminal.output import console, new_table, printable
from kdpipe.pipeline.terminal.progress import reporter
from kdpipe.stages.evaluation.latency import WARM_UP_ROUNDS, Latency, measure_latency
from kdpipe.stages.runtime.cpu import cpu_features, cpu_name, num_cores
from kdpipe.stages.runtime.events import ProgressEvent

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_BATCH_SIZES = (1, 64)


@dataclass(frozen=True)
class Measured:
    """Size and latency of one file. `num_bytes` includes external weights; `latency` is by batch size."""

    path: Path
    num_bytes: int
    latency: dict[int, Latency]

    @property
    def images_per_s(self) -> float:
        """Images per second at the largest batch size."""
        largest = max(self.latency)
        return 1000 * largest / self.latency[largest].p50_ms

    def time_against(self, first: Measured) -> float:
        """Return the ratio of the medians at the largest batch size."""
        return first.images_per_s / self.images_per_s

    def to_json(self, first: Measured) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.num_bytes,
            "latency": [{"batch_size": size, **latency.to_json()} for size, latency in self.latency.items()],
            "images_per_s": self.images_per_s,
            "time_against_first": self.time_against(first),
        }


@dataclass(frozen=True)
class Bench:
    """Results of a benchmark, with the CPU and the settings."""

    cpu: str
    features: list[str]
    num_threads: int
    num_rounds: int
    files: list[Measured]

    def to_json(self) -> dict[str, Any]:
        return {
            "command": "bench",
            "cpu": self.cpu,
            "cpu_features": self.features,
            "num_threads": self.num_threads,
            "num_rounds": self.num_rounds,
            "onnxruntime": onnxruntime.__version__,
            "files": [file.to_json(self.files[0]) for file in self.files],
        }


def run_bench(
    paths: Sequence[Path], batch_sizes: Sequence[int], *, num_threads: int | None, num_rounds: int, as_json: bool
) -> Bench:
    """Measure the files in turn.

    Args:
        paths: ONNX files.
        batch_sizes: Batch sizes; 1 and 64 if empty.
        num_threads: Threads; None for all cores of this process.
        num_rounds: Measurements of each file.
        as_json: Whether progress is JSON lines.

    Raises:
        ModelError: If a file is missing, not an ONNX network, or does not take images.
    """
    sizes = list(dict.fromkeys(batch_sizes or DEFAULT_BATCH_SIZES))
    num_threads = num_threads or num_cores()
    with _progress(len(sizes) * (num_rounds + WARM_UP_ROUNDS), as_json) as tick:
        latency = measure_latency(
            {str(number): path for number, path in enumerate(paths)},  # a file given twice shows the noise
            None,
            sizes,
            num_rounds=num_rounds,
            num_threads=num_threads,
            between_rounds=tick,
        )
    files = [Measured(path, file_bytes(path), latency[str(number)]) for number, path in enumerate(paths)]
    return Bench(cpu_name(), cpu_features(), num_threads, num_rounds, files)


@contextmanager
def _progress(total: int, as_json: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call before each of `total` rounds."""
    done = -1
    with reporter(as_json) as report:

        def tick() -> None:
            nonlocal done
            done += 1
            report(ProgressEvent("bench", "latency", done, total, "round"))

        yield tick
        tick()


def file_bytes(path: Path) -> int:
    """Return the size of an ONNX file and of its external data files."""
    graph = onnx.load(path, load_external_data=False).graph
    external = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)


def print_bench(bench: Bench) -> None:
    """Print the table to stdout."""
    out = console()
    features = ", ".join(bench.features) or "none known"
    out.print(f"CPU: {bench.cpu} ({features}), threads: {bench.num_threads}, onnxruntime {onnxruntime.__version__}")
    out.print(_table(bench))
    out.print(
        f"p50 / p95 of {bench.num_rounds} rounds, alternating between the files. Images/s and time / first: medians at "
        "the largest batch size."
    )


def _table(bench: Bench) -> Table:
    table = new_table()
    table.add_column("file", overflow="fold")
    sizes = list(bench.files[0].latency)
    for header in ("bytes", *(f"batch {size}, ms" for size in sizes), "images/s", "time / first"):
        table.add_column(header, justify="right", no_wrap=True)
    for file in bench.files:
        table.add_row(
            printable(str(file.path)),
            f"{file.num_bytes:,}",
            *(f"{latency.p50_ms:.3f} / {latency.p95_ms:.3f}" for latency in file.latency.values()),
            f"{file.images_per_s:,.0f}",
            f"{file.time_against(bench.files[0]):.3f}",
        )
    return table
