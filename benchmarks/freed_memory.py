"""Measure the speed-up on a CPU if the allocator keeps freed memory: forward passes with and without, in turn.

    uv run python benchmarks/freed_memory.py [--rounds N]

Each turn runs in its own process, since the setting applies to a process. Prints median rates and the median ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch

from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.runtime.memory import disable_malloc_trim

TEACHERS = {
    "resnet32x4": (ModelConfig(name="resnet32x4"), 3, (32, 32), 100),
    "cnn": (ModelConfig(name="cnn", args={"width": 32}), 1, (28, 28), 10),
}
BATCH_SIZE = 256
TURN_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", nargs=2, metavar=("TEACHER", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        teacher, keep = arguments.turn
        print(turn(teacher, keep == "yes"))
        return
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, forward passes of {BATCH_SIZE} images\n")
    print("| teacher | memory returned, images/s | memory kept, images/s | ratio |\n|---|---:|---:|---:|")
    for teacher in TEACHERS:
        rates = {keep: [turn_in_process(teacher, keep)] for keep in ("no", "yes")}
        for _ in range(arguments.rounds - 1):
            for keep, found in rates.items():
                found.append(turn_in_process(teacher, keep))
        ratio = statistics.median(kept / base for kept, base in zip(rates["yes"], rates["no"], strict=True))
        base, kept = (statistics.median(found) for found in rates.values())
        print(f"| {teacher} | {base:,.0f} | {kept:,.0f} | {ratio:.2f} |", flush=True)


def turn_in_process(teacher: str, keep: str) -> float:
    command = [sys.executable, __file__, "--turn", teacher, keep]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def turn(teacher: str, keep: bool) -> float:
    """Return images per second over TURN_S, after two warm-up passes."""
    if keep:
        disable_malloc_trim()
    config, channels, size, num_classes = TEACHERS[teacher]
    model = build_model(config, num_classes=num_classes, in_channels=channels, image_size=size, seed=0).eval()
    images = torch.randn(BATCH_SIZE, channels, *size)
    for _ in range(2):
        model(images)
    started, num_images = time.perf_counter(), 0
    while time.perf_counter() - started < TURN_S:
        model(images)
        num_images += BATCH_SIZE
    return num_images / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
