"""Measure what it costs to check the shards of a mapped store against their checksums at first use.

    uv run python benchmarks/mapped_checks.py [--gib N] [--dir FOLDER]

Writes a store of one view of N GiB, and reads one epoch of it in random batches of 256 rows, with `verify = "first"`
and "never", each with the files in the page cache and dropped from it (posix_fadvise). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np

from kdpipe.store import (
    ArraySpec,
    Identity,
    Manifest,
    Samples,
    StoreLayout,
    create_store,
    finish_store,
    open_store,
    rows_per_unit,
    write_unit,
)
from kdpipe.store.read.mapped_views import Verify

SPEC = ArraySpec("logits", (1000,), "float16")
BATCH_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder) / "store.zarr"
        num_rows = int(options.gib * 2**30) // SPEC.row_bytes
        write(path, num_rows)
        print("| files | verify | one epoch, s | of never |\n|---|---|---:|---:|")
        for cached in (True, False):
            walls = {verify: epoch_s(path, verify, num_rows, cached=cached) for verify in ("never", "first")}
            for verify, wall_s in walls.items():
                name = "in the page cache" if cached else "on disk"
                print(f"| {name} | {verify} | {wall_s:.2f} | {wall_s / walls['never']:.2f} |")


def write(path: Path, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    samples = Samples(rng.permutation(num_rows), np.zeros(num_rows, np.int64), np.zeros(num_rows, np.uint32))
    layout = StoreLayout(1, rows_per_unit([SPEC], num_rows, 64 * 2**20), (num_rows,))
    manifest = Manifest(Identity({}, samples.digests(), {}), (SPEC,), layout, {})
    create_store(path, manifest, samples)
    for unit in layout.units():
        write_unit(path, manifest, unit, {"logits": rng.random((unit.num_rows, 1000), np.float32).astype(np.float16)})
    finish_store(path)


def epoch_s(path: Path, verify: Verify, num_rows: int, *, cached: bool) -> float:
    assert verify in get_args(Verify)
    for file in (path / "logits").rglob("0"):
        if file.is_file() and cached:
            file.read_bytes()
        elif file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    store = open_store(path).verifying(verify)
    order = np.random.default_rng(1).permutation(num_rows)
    started = time.perf_counter()
    for start in range(0, num_rows, BATCH_ROWS):
        store.gather("logits", 0, store.samples.ids[order[start : start + BATCH_ROWS]])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
