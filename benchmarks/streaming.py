"""Stream a store larger than memory_bytes: measure the memory, the speed, and how well its order mixes.

    uv run python benchmarks/streaming.py [--store-mib 1024] [--memory-mib 128]

Each mode of reading runs in its own process; its peak is the growth of the resident set since the first batch.
Streaming checks every slab's checksum. Mixing is measured on samples sorted by class, the worst case: the variance of
a class's count in a batch of 128, over that of a full shuffle (1 is a full shuffle; batches of a single class would be
about 100), once with rows in a store's mixed order and once in the original order.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kdpipe.stages.data.loader.sampling import epoch_order, shard_order
from kdpipe.stages.targets.join import JoinedStore
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.store import (
    ArraySpec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    create_store,
    finish_store,
    open_store,
    row_order,
    rows_per_unit,
    write_unit,
)

MIB = 2**20
NUM_CLASSES = 1000
BATCH_SIZE = 256
MODES = ("memory", "mapped", "streamed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store-mib", type=int, default=1024)
    parser.add_argument("--memory-mib", type=int, default=128)
    parser.add_argument("--read", nargs=2, metavar=("MODE", "STORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        mode, path = arguments.read
        print(json.dumps(read(mode, Path(path), arguments.memory_mib * MIB)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        make_store(path, arguments.store_mib * MIB)
        print(f"| {arguments.store_mib} MiB of logits, an epoch | rows/s | peak beyond start, MiB |\n|---|---:|---:|")
        for mode in MODES:
            found = read_in_process(mode, path, arguments.memory_mib)
            print(f"| {mode} | {found['rows_per_s']:,.0f} | {found['peak_bytes'] / MIB:,.0f} |", flush=True)
        print(f"\nThe streamed bound: memory_bytes = {arguments.memory_mib} MiB, and the one slab being read.\n")
    print_mixing()


def make_store(path: Path, num_bytes: int) -> None:
    num_samples = num_bytes // (2 * NUM_CLASSES)
    ids = np.arange(num_samples)
    samples = Samples(ids, ids % NUM_CLASSES, np.zeros(num_samples, np.uint32))
    spec = ArraySpec("logits", (NUM_CLASSES,), "float16")
    layout = StoreLayout(1, rows_per_unit([spec], num_samples, 16 * MIB), (num_samples,))
    manifest = Manifest(Identity({}, samples.digests(), {}), (spec,), layout, {})
    create_store(path, manifest, samples)
    rng = np.random.default_rng(0)
    for unit in layout.units():
        rows = rng.standard_normal((unit.num_rows, NUM_CLASSES), np.float32).astype(np.float16)
        write_unit(path, manifest, unit, {"logits": rows})
    finish_store(path)


def read_in_process(mode: str, path: Path, memory_mib: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", mode, str(path), "--memory-mib", str(memory_mib)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def read(mode: str, path: Path, memory_bytes: int) -> dict[str, float]:
    """Gather one epoch in one mode."""
    store = open_store(path)
    source = JoinedStore(store, torch.from_numpy(store.rows_of(store.samples.ids)), ())
    config = {
        "memory": TargetLoadingConfig(memory_bytes=2**40),
        "mapped": TargetLoadingConfig(memory_bytes=0, mapped_bytes=2**40),
        "streamed": TargetLoadingConfig(memory_bytes=memory_bytes, mapped_bytes=0),
    }[mode]
    targets = Targets([source], torch.device("cpu"), config)
    assert targets.residence == mode, targets.residence
    if targets.slabs is None:
        order = epoch_order(0, 0, store.num_samples)
    else:
        order = shard_order(0, 0, targets.slabs, targets.window)
    before = resident_bytes()
    started = time.perf_counter()
    for indices in order.split(BATCH_SIZE):
        targets.batch(0, indices)
    time_s = time.perf_counter() - started
    return {"rows_per_s": store.num_samples / time_s, "peak_bytes": max(0, resident_bytes() - before)}


def resident_bytes() -> int:
    """Return the peak memory of this process, mapped pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_mixing() -> None:
    num_samples, batch_size, unit_rows = 50_000, 128, 1024
    labels = torch.arange(num_samples) * 100 // num_samples
    mixed = torch.from_numpy(np.argsort(row_order(np.arange(num_samples), 0)))  # the row of each sample
    print("| rows of a store | slabs mixed at a time | variance over a full shuffle's |\n|---|---:|---:|")
    full = np.mean([variance(labels, epoch_order(0, epoch, num_samples), batch_size) for epoch in range(5)])
    for name, rows in (("in their mixed order", mixed), ("in the original order, by class", torch.arange(num_samples))):
        for window in (1, 4, 16):
            orders = [shard_order(0, epoch, rows // unit_rows, window) for epoch in range(5)]
            ratio = np.mean([variance(labels, order, batch_size) for order in orders]) / full
            print(f"| {name} | {window} | {ratio:.2f} |")


def variance(labels: torch.Tensor, order: torch.Tensor, batch_size: int) -> float:
    """Return the variance over batches of a class's count in a batch, averaged over classes."""
    counts = torch.stack([torch.bincount(labels[indices], minlength=100) for indices in order.split(batch_size)[:-1]])
    return float(counts.double().var(0).mean())


if __name__ == "__main__":
    main()
