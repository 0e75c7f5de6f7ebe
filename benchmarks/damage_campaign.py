"""Damage target stores: kill writers at random moments, and flip single bits in any file.

    uv run python benchmarks/damage_campaign.py [--kills N] [--flips N] [--seed N] [--dir FOLDER]

Kills: a store of a random profile is extended several times (more views, more samples, another layer). For each
extension, one to three writer processes are started and killed by SIGKILL after a random time, repeatedly; after each
kill, reading the store must give correct numbers or a clear error. At the end, all its files must equal, byte for
byte, those of a store that one writer filled without interruption.

Flips: one bit of one file of a finished store of any profile. `verify_store` must find it, and reading with checks
must refuse the store or give correct numbers. Prints a Markdown table; exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.made_store import folder_bytes
from support.many_stores import LOGITS, Form, Wish, first_difference, grow, work

from kdpipe.store import Codec, KdpipeError, open_store
from kdpipe.store.check.verify import verify_store

PROFILES = [
    replace(form, codec=codec) for form in LOGITS.values() for codec in (None, Codec("zstd", 3), Codec("blosc", 3))
]
MAX_LIFETIME_S = 0.08
"""The longest life of a writer, too short for most of them to finish."""


def wishes_of(form: Form) -> list[Wish]:
    first = Wish(form, num_views=1, num_samples=600, num_layers=0)
    return [
        first,
        replace(first, num_views=2),
        replace(first, num_views=2, num_samples=1100),
        replace(first, num_views=3, num_samples=1300, num_layers=2),
    ]


@cache
def uninterrupted(form: Form) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return folder_bytes(grow(Path(folder) / "a.zarr", *wishes_of(form)))


def kill_campaign(folder: Path, num_kills: int, rng: random.Random) -> Counter[str]:
    count: Counter[str] = Counter()
    while count["writers killed"] < num_kills:
        form = rng.choice(PROFILES)
        path = folder / f"{count['stores']}.zarr"
        count["stores"] += 1
        for wish in wishes_of(form):
            for _ in range(rng.randint(2, 6)):
                count["writers killed"] += kill_some(path, wish, rng)
                count[read_result(path)] += 1
            work(path, wish)
            count["extensions finished wrongly"] += read_result(path) != "reads: correct"
        leftovers = {file.name for file in folder.iterdir()} - {path.name, f".{path.name}.lock", f".{path.name}.locks"}
        same = folder_bytes(path) == uninterrupted(form) and not leftovers
        count["stores equal to an uninterrupted one" if same else "stores that differ"] += 1
        for file in folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return count


def kill_some(path: Path, wish: Wish, rng: random.Random) -> int:
    """Start writers and kill them; return the number that were not done."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=work, args=(path, wish)) for _ in range(rng.randint(1, 3))]
    for writer in writers:
        writer.start()
    for writer in writers:
        time.sleep(rng.uniform(0, MAX_LIFETIME_S / len(writers)))
        writer.kill()
    for writer in writers:
        writer.join()
    if any(writer.exitcode not in (0, -9) for writer in writers):
        raise RuntimeError("a writer failed by itself: see its traceback above")
    return sum(writer.exitcode == -9 for writer in writers)


def read_result(path: Path) -> str:
    try:
        return "reads: wrong numbers" if first_difference(open_store(path)) else "reads: correct"
    except KdpipeError:
        return "reads: refused"


def flip_campaign(folder: Path, num_flips: int, rng: random.Random) -> Counter[str]:
    paths = []
    for number, form in enumerate(PROFILES):
        paths.append(grow(folder / f"whole-{number}.zarr", wishes_of(form)[-1]))
        paths.append(grow(folder / f"grown-{number}.zarr", *wishes_of(form)))
    files = [(path, file) for path in paths for file in sorted(path.rglob("*")) if file.is_file()]
    count: Counter[str] = Counter()
    while count["bits flipped"] < num_flips:
        path, file = rng.choice(files)
        before = file.read_bytes()
        offset, bit = rng.randrange(len(before)), rng.randrange(8)
        file.write_bytes(before[:offset] + bytes([before[offset] ^ 1 << bit]) + before[offset + 1 :])
        count["bits flipped"] += 1
        if verify_store(path).damaged:
            count["found by verify_store"] += 1
        else:
            count["not found by verify_store"] += 1
            print(f"not found: bit {bit} of byte {offset} of {file.relative_to(folder)}", file=sys.stderr)
        count[checked_read_result(path)] += 1
        file.write_bytes(before)
    return count


def checked_read_result(path: Path) -> str:
    """Read everything, mapped and into memory, which both check every shard."""
    try:
        found = first_difference(open_store(path))
    except KdpipeError:
        return "reading with checks: refused"
    return "reading with checks: wrong numbers" if found else "reading with checks: correct"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        rng = random.Random(options.seed)
        kills = kill_campaign(Path(folder), options.kills, rng)
        flips = flip_campaign(Path(folder), options.flips, rng)
    print("| campaign | result | count |\n| --- | --- | ---: |")
    for name, count in (("kills", kills), ("flips", flips)):
        for what, number in sorted(count.items()):
            print(f"| {name} | {what} | {number:,} |")
    failures = ("stores that differ", "reads: wrong numbers", "extensions finished wrongly")
    wrong = sum(kills[what] for what in failures)
    wrong += flips["not found by verify_store"] + flips["reading with checks: wrong numbers"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
