"""Run `kdpipe bench`: measure the latency of ONNX files on this machine's CPU, relative to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pipeline.command import printable
from pipeline.progress import reporter
from stages.compression.cpu import cpu_features, cpu_name
from stages.compression.latency import WARM_UP_ROUNDS, Latency, measure_latency
from stages.machine.cores import num_cores
from stages.watch import Event

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_BATCH_SIZES = (1, 64)


@dataclass(frozen=True)
class FileResult:
    """One file's size, external weights included, and its latency by batch size."""

    path: Path
    num_bytes: int
    latency: dict[int, Latency]

    @property
    def images_per_s(self) -> float:
        """Throughput at the largest batch size."""
        largest = max(self.latency)
        return 1000 * largest / self.latency[largest].p50_ms

    def time_against(self, first: FileResult) -> float:
        """Return its median latency relative to `first`'s, at the largest batch size."""
        return first.images_per_s / self.images_per_s

    def to_json(self, first: FileResult) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.num_bytes,
            "latency": [{"batch_size": size, **latency.to_json()} for size, latency in self.latency.items()],
            "images_per_s": self.images_per_s,
            "time_against_first": self.time_against(first),
        }


@dataclass(frozen=True)
class Bench:
    """The results, with the CPU and settings."""

    cpu: str
    features: list[str]
    num_threads: int
    num_rounds: int
    files: list[FileResult]

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
    """Measure the files in turn; no `batch_sizes` means 1 and 64, no `num_threads` all cores of this process.

    Raises:
        ModelError: If a file is missing, not an ONNX network, or not one that takes images.
    """
    sizes = list(dict.fromkeys(batch_sizes or DEFAULT_BATCH_SIZES))
    num_threads = num_threads or num_cores()
    with _progress(len(sizes) * (num_rounds + WARM_UP_ROUNDS), as_json) as tick:
        latency = measure_latency(
            {str(number): path for number, path in enumerate(paths)},  # a file may be given twice, to see the noise
            None,
            sizes,
            num_rounds=num_rounds,
            num_threads=num_threads,
            between_rounds=tick,
        )
    files = [FileResult(path, file_bytes(path), latency[str(number)]) for number, path in enumerate(paths)]
    return Bench(cpu_name(), cpu_features(), num_threads, num_rounds, files)


@contextmanager
def _progress(total: int, as_json: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call before each of `total` rounds."""
    done = -1
    with reporter(as_json) as report:

        def tick() -> None:
            nonlocal done
            done += 1
            report(Event("bench", "latency", done, total, "round"))

        yield tick
        tick()


def file_bytes(path: Path) -> int:
    """Return the size of an ONNX file and of the external files with its weights."""
    graph = onnx.load(path, load_external_data=False).graph
    external = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)


def print_bench(bench: Bench) -> None:
    """Print the table to stdout."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120, markup=False, highlight=False)
    features = ", ".join(bench.features) or "none known"
    console.print(f"CPU: {bench.cpu} ({features}), threads: {bench.num_threads}, onnxruntime {onnxruntime.__version__}")
    console.print(_table(bench))
    console.print(
        f"p50 / p95 of {bench.num_rounds} rounds, the files in turn. Images/s and time / first: medians at the largest "
        "batch."
    )


def _table(bench: Bench) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
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
