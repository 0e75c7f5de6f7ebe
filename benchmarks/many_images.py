"""Measure what listing and scanning a data set of ImageNet-1k's size takes: CPU time and peak memory.

    uv run python benchmarks/many_images.py [--images N] [--kinds KIND ...] [--folder FOLDER] [--quick]

Tar shards of 10,000 samples (webdataset), an LMDB database, and Parquet files of a Hugging Face data set, with N PNG
images of one gray pixel and 1,000 classes. Each is loaded twice in processes of its own, as the first and the next job
of a run do: listed, then scanned, which decodes each image for its checksum and shape; nothing is kept in memory. The
caches begin empty. CPU time and peak memory are those of the process, from its start.

--list: listed only. --quick: 20,000 images.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

KINDS = ("webdataset", "lmdb", "hf_dataset")
NUM_CLASSES, SHARD = 1000, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--folder", type=Path, default=None, help="where the data sets are written; they are removed")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--load", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, scans=not arguments.list)
        return
    num_images = 20_000 if arguments.quick else arguments.images
    print(f"{'':<36}{'images':>10} {'CPU s':>8} {'wall s':>8} {'peak MiB':>10}", flush=True)
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            place = Path(folder, "data")
            place.mkdir()
            {"webdataset": write_tars, "lmdb": write_lmdb, "hf_dataset": write_parquet}[kind](place, num_images)
            caches = {"XDG_CACHE_HOME": str(Path(folder, "cache")), "HF_HOME": str(Path(folder, "hf"))}
            time.sleep(3)  # files that have just been written are not cached
            for turn in ("first", "next"):
                command = [sys.executable, __file__, "--load", f"{kind}:{place}", *["--list"] * arguments.list]
                subprocess.run(["env", f"TURN={kind} {turn}", *command], env={**os.environ, **caches}, check=True)


def load(name: str, *, scans: bool) -> None:
    """List a data set in this process, scan it, and print what that took."""
    from kdpipe.stages.data.config import DataConfig
    from kdpipe.stages.data.load import list_source, load_dataset

    config, start = DataConfig(name=name, test_share=0.01, cache_bytes=0), time.perf_counter()
    report("imported", start)
    report("listed", start, len(list_source(config, "train", None).labels))
    if scans:
        report("listed again, scanned", start, load_dataset(config, "train", keep=False).num_samples)


def report(what: str, start: float, num_images: int = 0) -> None:
    """Print the CPU time and peak memory of this process so far."""
    cpu_s, wall_s = time.process_time(), time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    name = f"{os.environ['TURN']} {what}"
    print(f"{name:<36}{num_images:>10,} {cpu_s:8.1f} {wall_s:8.1f} {peak:10.0f}", flush=True)


def samples(num_images: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield name, PNG and class of each image."""
    encoded = []
    for gray in range(256):
        file = io.BytesIO()
        Image.new("L", (1, 1), gray).save(file, "png")
        encoded.append(file.getvalue())
    for number in range(num_images):
        yield f"n{number % NUM_CLASSES:08}_{number:07}", encoded[number % 256], number % NUM_CLASSES


def write_tars(place: Path, num_images: int) -> None:
    rows = samples(num_images)
    for shard in range(0, num_images, SHARD):
        with tarfile.open(place / f"train-{shard // SHARD:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, (name, png, label) in zip(range(min(SHARD, num_images - shard)), rows, strict=False):
                for suffix, content in (("png", png), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_lmdb(place: Path, num_images: int) -> None:
    import lmdb

    with lmdb.open(str(place), map_size=2**36, sync=False) as database, database.begin(write=True) as transaction:
        for name, png, label in samples(num_images):
            transaction.put(f"{name}.png".encode(), png)
            transaction.put(f"{name}.cls".encode(), str(label).encode())


def write_parquet(place: Path, num_images: int) -> None:
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"class {number}" for number in range(NUM_CLASSES)])
    )
    rows = samples(num_images)
    shard = 20 * SHARD
    for start in range(0, num_images, shard):
        some = [row for _, row in zip(range(min(shard, num_images - start)), rows, strict=False)]
        columns = {
            "image": [{"bytes": png, "path": None} for _, png, _ in some],
            "label": [label for *_, label in some],
        }
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(str(place / f"train-{start // shard:03}.parquet"))


if __name__ == "__main__":
    main()
