"""Measure the latency of exported files on this machine's CPU, relative to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.progress import reporter
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.stages.evaluation.latency import WARM_UP_ROUNDS, Latency, measure_latency
from kdpipe.stages.export.runtimes import library_of
from kdpipe.stages.runtime.cpu import cpu_features, cpu_name, num_cores
from kdpipe.stages.runtime.events import ProgressEvent

DEFAULT_BATCH_SIZES = (1, 64)


def run_bench(
    paths: Sequence[Path], batch_sizes: Sequence[int], *, num_threads: int | None, num_rounds: int, as_json: bool
) -> dict[str, Any]:
    """Measure files in turn, each in the runtime that it is for, and return the results as JSON.

    Without batch sizes 1 and 64 are measured, without `num_threads` on all cores of this process. `as_json` makes the
    progress JSON lines.

    Raises:
        ModelError: If a file is missing, no network, or does not take images; or if its runtime is not installed.
    """
    sizes = list(dict.fromkeys(batch_sizes or DEFAULT_BATCH_SIZES))
    num_threads = num_threads or num_cores()
    with _progress(len(sizes) * (num_rounds + WARM_UP_ROUNDS), as_json) as tick:
        latencies = measure_latency(
            {str(number): path for number, path in enumerate(paths)},  # a file given twice shows the noise
            None,
            sizes,
            num_rounds=num_rounds,
            num_threads=num_threads,
            between_rounds=tick,
        )
    return {
        "command": "bench",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "num_threads": num_threads,
        "num_rounds": num_rounds,
        "runtimes": {name: version(name) for name in dict.fromkeys(map(library_of, paths))},
        "files": [_file(path, latencies[str(number)], latencies["0"]) for number, path in enumerate(paths)],
    }


def _file(path: Path, latency: Mapping[int, Latency], first: Mapping[int, Latency]) -> dict[str, Any]:
    """Return a file's results; the rate and the ratio to the first file are those of the largest batch size."""
    largest = max(latency)
    return {
        "path": str(path),
        "runtime": library_of(path),
        "bytes": file_bytes(path),
        "latency": [{"batch_size": size, **found.to_json()} for size, found in latency.items()],
        "images_per_s": 1000 * largest / latency[largest].p50_ms,
        "time_against_first": latency[largest].p50_ms / first[largest].p50_ms,
    }


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
    """Return the size of an ONNX file with its external data files, of an IR with its weights, or of a program."""
    if library_of(path) == "openvino":
        return path.stat().st_size + path.with_suffix(".bin").stat().st_size
    if library_of(path) == "executorch":
        return path.stat().st_size
    graph = onnx.load(path, load_external_data=False).graph
    external = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)


def print_bench(bench: Mapping[str, Any]) -> None:
    """Print the results of `run_bench` as a table to stdout."""
    sizes = [latency["batch_size"] for latency in bench["files"][0]["latency"]]
    headers = ["file", "bytes", *(f"batch {size}, ms" for size in sizes), "images/s", "time / first"]
    cells = []
    for file in bench["files"]:
        times = (f"{latency['p50_ms']:.3f} / {latency['p95_ms']:.3f}" for latency in file["latency"])
        rates = (f"{file['images_per_s']:,.0f}", f"{file['time_against_first']:.3f}")
        cells.append([file["path"], f"{file['bytes']:,}", *times, *rates])
    out = console()
    out.print(
        f"CPU: {bench['cpu']} ({', '.join(bench['cpu_features']) or 'none known'}), threads: {bench['num_threads']}, "
        f"{', '.join(f'{name} {found}' for name, found in bench['runtimes'].items())}"
    )
    print_table(out, Table("", headers, cells))
    out.print(
        f"p50 / p95 of {bench['num_rounds']} rounds, alternating between the files. Images/s and time / first: medians "
        "at the largest batch size."
    )
