"""Soak test: kill a whole `kdpipe run` repeatedly, at random moments and by random signals, and restart it.

A shell loop restarts it each time, as a batch system would. It has to end with the bytes of an uninterrupted run.

    uv run python benchmarks/soak.py recipes/mnist.toml --kills 100 [--set KEY=VALUE ...]

Half of the kills are SIGKILL, which saves nothing; the others request a stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

KDPIPE = [sys.executable, "-c", "from kdpipe.pipeline.main import main; main()"]

LOOP = """
while true; do
    "$@" & echo $! > "$PID_FILE"; wait $!; code=$?
    echo "$code" >> "$CODES_FILE"
    [ "$code" -eq 75 ] || [ "$code" -eq 137 ] || exit "$code"
done
"""
"""A job script that reruns the command while it stops early or is killed."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

SUFFIXES = (".safetensors", ".onnx", ".pt2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--between", type=float, nargs=2, default=(1.0, 16.0), metavar="S", help="seconds until a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder of the runs; finished runs in it are reused")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["KDPIPE_WORKSPACE"] = "none"  # runs that are compared compute everything themselves
    command = [
        *KDPIPE,
        "run",
        str(options.recipe),
        *(word for pair in options.set for word in ("--set", pair)),
        "--run",
    ]

    started = time.monotonic()
    subprocess.run([*command, str(folder / "uninterrupted")], check=True, stdout=subprocess.DEVNULL)
    print(f"uninterrupted: {time.monotonic() - started:.0f} s", flush=True)

    started = time.monotonic()
    code, kills = soak([*command, str(folder / "killed")], folder, options)
    codes = Counter((folder / "codes").read_text().split())
    print(f"killed {sum(kills.values())} times in {time.monotonic() - started:.0f} s, exit status {code} in the end")
    print("  by signal: " + ", ".join(f"{name} {count}" for name, count in sorted(kills.items())))
    print("  exit statuses: " + ", ".join(f"{name} {count} times" for name, count in sorted(codes.items())))
    differing = compare(folder / "uninterrupted", folder / "killed")
    for name in differing:
        print(f"  DIFFERS: {name}")
    print(
        "every network, exported file and store file equals the uninterrupted run's, bit for bit"
        if not differing
        else "FAILED"
    )
    sys.exit(bool(differing) or code)


def soak(command: list[str], folder: Path, options: argparse.Namespace) -> tuple[int, Counter[str]]:
    """Run the loop and kill its commands; return its exit status, and the number of kills by signal."""
    rng, kills, pid_file = random.Random(options.seed), Counter[str](), folder / "pid"
    (folder / "codes").write_text("")
    environment = {**os.environ, "PID_FILE": str(pid_file), "CODES_FILE": str(folder / "codes")}
    pid_file.write_text("")
    with (folder / "log").open("w") as log:
        loop = subprocess.Popen(["sh", "-c", LOOP, "sh", *command], env=environment, stdout=log, stderr=log)
        last = ""
        while sum(kills.values()) < options.kills and loop.poll() is None:
            pid = pid_file.read_text().strip()
            if pid in ("", last):
                time.sleep(0.02)
                continue
            last = pid
            time.sleep(rng.uniform(*options.between))
            number = signal.SIGKILL if rng.random() < 0.5 else rng.choice(STOP_SIGNALS)
            try:
                os.kill(int(pid), number)
            except ProcessLookupError:
                continue
            kills[number.name] += 1
            print(f"  {sum(kills.values())}: {number.name} {last_progress(folder / 'killed')}", flush=True)
        return loop.wait(), kills


def last_progress(run: Path) -> str:
    """Describe how far the killed run was, by its last progress event."""
    try:
        events = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()[-20:]]
    except (OSError, ValueError):
        return "before the first event, or while one was written"
    event = next((event for event in reversed(events) if event.get("kind") == "progress"), None)
    return (
        f"after {event['stage']}: {event['job']}, {event['unit']} {event['step']}"
        if event
        else "before the first event"
    )


def compare(uninterrupted: Path, killed: Path) -> list[str]:
    """Return the files that differ, or that only one run has."""
    found, expected = files(killed), files(uninterrupted)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def files(run: Path) -> dict[str, bytes]:
    networks = [path for path in run.rglob("*") if path.suffix in SUFFIXES]
    stores = [path for store in run.glob("*.zarr") for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in (*networks, *stores)}


if __name__ == "__main__":
    main()
