"""Run one kdpipe command with the code of two checkouts in turn, and compare its time and its files.

    git worktree add ../before COMMIT
    uv run python benchmarks/two_checkouts.py ../before . -- run recipes/digits.toml --set student.seeds=[0]

Every run has a new folder, to which `--run` is added. Ratios are the first checkout's time over the second's, medians
over the rounds: of the process's own time on the CPU with that of its workers, which other programs change less, and of
the clock. Networks and store files of the last round are compared byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENTRY = "import sys; from kdpipe.pipeline.entry import main; sys.exit(main())"

NETWORKS = (".safetensors", ".onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("command", nargs="+", help="after --: what follows `kdpipe`")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one, other = (path.resolve() for path in arguments.checkouts)
    cpu_s: dict[Path, list[float]] = {one: [], other: []}
    wall_s: dict[Path, list[float]] = {one: [], other: []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs = {checkout: Path(folder, str(index), "run") for index, checkout in enumerate((one, other))}
            for checkout in (one, other) if number % 2 == 0 else (other, one):
                cpu, wall = run(checkout, arguments.command, runs[checkout])
                cpu_s[checkout].append(cpu)
                wall_s[checkout].append(wall)
                print(f"  round {number}, {checkout}: {cpu:.1f} s of CPU, {wall:.1f} s", flush=True)
            equal, found = compare(*runs.values())
    for name, seconds in (("CPU time", cpu_s), ("time", wall_s)):
        ratio = statistics.median(before / after for before, after in zip(seconds[one], seconds[other], strict=True))
        before, after = statistics.median(seconds[one]), statistics.median(seconds[other])
        print(f"{name}: {before:.1f} s and {after:.1f} s, ratio {ratio:.2f}")
    print(f"{equal} of {found} networks, ONNX files and shards are equal, byte for byte")


def run(checkout: Path, command: list[str], folder: Path) -> tuple[float, float]:
    """Run the command, and return its seconds on the CPU and by the clock."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    folder.parent.mkdir(parents=True)
    started, before = time.perf_counter(), os.times()
    command = [sys.executable, "-c", ENTRY, *command, "--run", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout} failed:\n{done.stderr}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return cpu, time.perf_counter() - started


def compare(one: Path, other: Path) -> tuple[int, int]:
    """Return how many artifacts of a run are equal in the other, and how many there are."""
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    paths = [path for path in files if path.suffix in NETWORKS or "c" in path.parts]  # Zarr's chunks are below c/
    equal, _, _ = filecmp.cmpfiles(one, other, paths, shallow=False)
    return len(equal), len(paths)


if __name__ == "__main__":
    main()
