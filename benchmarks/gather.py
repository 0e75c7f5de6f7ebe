"""Compare gathering random batches of stored targets: kdpipe by sample id, np.memmap and others by row.

    uv run --with h5py --with lmdb python benchmarks/gather.py [--rounds N] [--dir FOLDER]

Every candidate stores the same float16 rows on the same disk, in the page cache, and returns the same batches of 256
rows, which is checked first. Each round measures all candidates in rotated order; the results are medians over the
rounds, and ratios to np.memmap's `take` in the same round. h5py and lmdb are included if they are installed.

A second table has the encodings of 100 and 1,000 logits: each gathered by id, array by array, against one np.memmap
with the same bytes a row; and the rate of gathering and decoding them with torch, for a softmax at T = 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from kdpipe.stages.targets.outputs import teacher_targets
from kdpipe.store import (
    ArraySpec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    TargetStore,
    TopK,
    create_store,
    default_temperatures,
    finish_store,
    open_store,
    rows_per_unit,
    write_unit,
)
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.quantized import Quantized
from kdpipe.store.format.encodings.sampled import Sampled

SHAPES = ((50_000, 100), (20_000, 1_000), (5_000, 64, 8, 8))
NAME = "logits"
BATCH_ROWS = 256
NUM_BATCHES = 400
SHARD_BYTES = 8 * 2**20
"""Smaller than kdpipe's default, so that the rows of a batch are in several shards."""

TURN_S = 0.2
TARGET = 0.9
MEMMAP, KDPIPE = "np.memmap, take", "kdpipe, by id"

Rows = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """The samples of one batch, int64 [B]: their rows and their ids."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]


Gather = Callable[[Batch], Rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dir", type=Path, help="folder for about 1 GB of temporary files")
    arguments = parser.parse_args()
    print(
        f"Batches of {BATCH_ROWS} random rows, median of {arguments.rounds} rounds, {os.cpu_count()} CPU cores, "
        f"numpy {np.__version__}, zarr {zarr.__version__}"
    )
    reached = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder, contextlib.ExitStack() as opened:
            reached.append(measure(shape, Path(folder), arguments.rounds, opened))
    for shape in SHAPES[:2]:
        measure_encodings(shape, arguments.dir, arguments.rounds)
    verdict = "met" if min(reached) >= TARGET else "NOT met"
    ratios = ", ".join(f"{ratio:.2f}" for ratio in reached)
    print(f"\nTarget of kdpipe by id, at least {TARGET} of np.memmap's take in every shape: {verdict} ({ratios}).")


def measure(shape: tuple[int, ...], folder: Path, num_rounds: int, opened: contextlib.ExitStack) -> float:
    """Print the table of one shape, and return the ratio of kdpipe."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape, np.float32).astype(np.float16)
    ids = rng.permutation(shape[0])
    candidates = make_candidates(values, ids, folder, opened)
    batches = [Batch(rows, ids[rows]) for rows in rng.integers(0, shape[0], (NUM_BATCHES, BATCH_ROWS))]
    for name, gather in candidates.items():
        if gather and gather(batches[0]).tobytes() != values[batches[0].rows].tobytes():
            raise SystemExit(f"{name} gathered the wrong rows")
    rates = run_rounds({name: gather for name, gather in candidates.items() if gather}, batches, num_rounds)
    print(f"\n| {list(shape)} float16 | rows/s | of {MEMMAP} |\n|---|---:|---:|")
    ratios = {}
    for name in candidates:
        if name not in rates:
            print(f"| {name} | not installed | |")
            continue
        ratios[name] = statistics.median(own / base for own, base in zip(rates[name], rates[MEMMAP], strict=True))
        digits = max(2, 1 - math.floor(math.log10(ratios[name])))
        print(f"| {name} | {statistics.median(rates[name]):,.0f} | {ratios[name]:.{digits}f} |")
    return ratios[KDPIPE]


def run_rounds(candidates: dict[str, Gather], batches: list[Batch], num_rounds: int) -> dict[str, list[float]]:
    """Return rows per second by candidate and round; the order rotates between rounds."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(num_rounds):
        names = list(candidates)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(one_turn(candidates[name], batches))
    return rates


def one_turn(gather: Gather, batches: list[Batch]) -> float:
    """Return rows per second over the batches that begin within TURN_S, at least one, after an untimed one."""
    gather(batches[0])
    num_rows, wall_s, started = 0, 0.0, time.perf_counter()
    for batch in itertools.cycle(batches):
        num_rows += len(gather(batch))
        wall_s = time.perf_counter() - started
        if wall_s >= TURN_S:
            break
    return num_rows / wall_s


def make_candidates(
    values: Rows, ids: NDArray[np.int64], folder: Path, opened: contextlib.ExitStack
) -> dict[str, Gather | None]:
    """Return the function that gathers a batch, by name; None if a library is not installed."""
    store = make_store(folder / "store.zarr", {NAME: values}, ids)
    array: Any = zarr.open_array(store.path / NAME, mode="r")
    return {
        MEMMAP: memmap_candidate(values, folder / "memmap"),
        KDPIPE: lambda batch: store.gather(NAME, 0, batch.ids),
        "lmdb, one value a row": lmdb_candidate(values, folder / "lmdb", opened) if has("lmdb") else None,
        "h5py, sorted rows": h5py_candidate(values, folder / "rows.h5", opened) if has("h5py") else None,
        "zarr, oindex": lambda batch: array.oindex[0, batch.rows],
        "zarr, row by row": lambda batch: np.stack([array[0, row] for row in batch.rows.tolist()]),
        "torch.load, one file a row": torch_candidate(values, folder / "torch"),
    }


def measure_encodings(shape: tuple[int, ...], parent: Path | None, num_rounds: int) -> None:
    """Print the table of the encodings of logits of one shape."""
    num_samples, num_classes = shape
    rng = np.random.default_rng(0)
    logits, ids = 3 * rng.standard_normal(shape, np.float32), rng.permutation(num_samples)
    batches = [Batch(rows, ids[rows]) for rows in rng.integers(0, num_samples, (NUM_BATCHES, BATCH_ROWS))]
    encodings: dict[str, LogitEncoding | None] = {
        "float16": None,
        "int8": Quantized("int8", num_classes),
        "int4": Quantized("int4", num_classes),
        "top-20": TopK(num_classes, 20, default_temperatures()),
        "20 sampled labels": Sampled(num_classes, 20, 0),
    }
    print(f"\n| logits {list(shape)} | bytes | rows/s | of {MEMMAP} | decoded, rows/s |\n|---|---:|---:|---:|---:|")
    for name, encoding in encodings.items():
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            arrays = encoding.encode(logits, "float16", ids, 0) if encoding else {NAME: logits.astype(np.float16)}
            store = make_store(Path(folder) / "store.zarr", arrays, ids, encoding)
            joined = np.concatenate([rows.view(np.uint8).reshape(num_samples, -1) for rows in arrays.values()], axis=1)
            candidates = {
                MEMMAP: memmap_candidate(joined, Path(folder) / "memmap"),
                KDPIPE: encoded_candidate(store, decode=False),
                "decoded": encoded_candidate(store, decode=True),
            }
            rates = run_rounds(candidates, batches, num_rounds)
        ratio = statistics.median(own / base for own, base in zip(rates[KDPIPE], rates[MEMMAP], strict=True))
        gathered, decoded = (statistics.median(rates[one]) for one in (KDPIPE, "decoded"))
        print(f"| {name} | {joined.shape[1]} | {gathered:,.0f} | {ratio:.2f} | {decoded:,.0f} |", flush=True)


def encoded_candidate(store: TargetStore, *, decode: bool) -> Gather:
    """Return the candidate that gathers the arrays of encoded logits, and may decode them for T = 1."""
    names = [spec.name for spec in store.arrays]

    def gather(batch: Batch) -> Rows:
        rows = {name: store.gather(name, 0, batch.ids) for name in names}
        if not decode:
            return rows[names[0]]
        tensors = {name: torch.from_numpy(one) for name, one in rows.items()}
        return teacher_targets(store.manifest.encoding, tensors, {}).logits_at(1.0).numpy()

    return gather


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def make_store(
    path: Path, arrays: dict[str, Rows], ids: NDArray[np.int64], encoding: LogitEncoding | None = None
) -> TargetStore:
    """Write a store of one view."""
    num_samples = len(ids)
    samples = Samples(ids, np.zeros(num_samples, np.int64), np.zeros(num_samples, np.uint32))
    specs = tuple(ArraySpec(name, values.shape[1:], str(values.dtype)) for name, values in arrays.items())
    unit_rows = rows_per_unit(specs, num_samples, SHARD_BYTES)
    geometry = StoreLayout(1, unit_rows, (num_samples,))
    manifest = Manifest(Identity({}, samples.digests(), {}), specs, geometry, {}, encoding=encoding)
    create_store(path, manifest, samples)
    for unit in geometry.units():
        write_unit(path, manifest, unit, {name: rows[unit.start : unit.stop] for name, rows in arrays.items()})
    finish_store(path)
    return open_store(path)


def memmap_candidate(values: Rows, path: Path) -> Gather:
    values.tofile(path)
    mapped = np.memmap(path, values.dtype, "r", shape=values.shape)
    return lambda batch: mapped.take(batch.rows, axis=0)


def lmdb_candidate(values: Rows, path: Path, opened: contextlib.ExitStack) -> Gather:
    environment = opened.enter_context(importlib.import_module("lmdb").open(str(path), map_size=2**30, sync=False))
    with environment.begin(write=True) as writing:
        for row, value in enumerate(values):
            writing.put(row.to_bytes(8, "big"), value.tobytes())
    reading = opened.enter_context(environment.begin(buffers=True))

    def gather(batch: Batch) -> Rows:
        content = b"".join([reading.get(row.to_bytes(8, "big")) for row in batch.rows.tolist()])
        return np.frombuffer(content, np.float16).reshape(-1, *values.shape[1:])

    return gather


def h5py_candidate(values: Rows, path: Path, opened: contextlib.ExitStack) -> Gather:
    """Return the candidate for h5py, which takes rows only in rising order and without repeats."""
    dataset = opened.enter_context(importlib.import_module("h5py").File(path, "w")).create_dataset(NAME, data=values)

    def gather(batch: Batch) -> Rows:
        rising, back = np.unique(batch.rows, return_inverse=True)
        rows: Rows = dataset[rising][back]
        return rows

    return gather


def torch_candidate(values: Rows, folder: Path) -> Gather:
    folder.mkdir()
    for row, value in enumerate(values):
        torch.save(torch.tensor(value), folder / f"{row}.pt")
    row_shape = values.shape[1:]

    def gather(batch: Batch) -> Rows:
        out = np.empty((len(batch.rows), math.prod(row_shape)), np.float16)
        for index, row in enumerate(batch.rows.tolist()):
            out[index] = torch.load(folder / f"{row}.pt", weights_only=True).numpy().reshape(-1)
        return out.reshape(-1, *row_shape)

    return gather


if __name__ == "__main__":
    main()
