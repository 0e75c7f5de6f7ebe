"""Compare training steps of two processes: gradients sent during the backward pass, after it, and by torch's DDP.

    OMP_NUM_THREADS=1 uv run python benchmarks/gradient_exchange.py [--model NAME] [--rounds N]

Two processes on this machine, connected by gloo, train a network for small images on 16 images each; the three ways
alternate, and medians over the rounds are printed. On a CPU sending takes the core that computes: the gain is that of
GPUs and of several machines, here it must not cost anything.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS, build_small_image_network
from kdpipe.stages.runtime.distributed import ProcessGroup, init_distributed
from kdpipe.stages.training.optimization.gradients import GradientAverage

BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32x4", choices=SMALL_IMAGE_NETWORKS)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    child = os.fork()  # before torch has threads
    os.environ |= {"RANK": "0" if child else "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    with init_distributed(os.environ) as processes:
        processes.use_device(torch.device("cpu"))
        seconds = time_in_turn(steps(options.model, processes), processes, options.rounds)
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name:7} {1000 * median:8.1f} ms a step")
    print(f"during against after: {medians['after'] / medians['during']:.2f} times the rate (at least .97 on a CPU)")
    print(f"during against DDP: {medians['DDP'] / medians['during']:.2f} times the rate")


def steps(name: str, processes: ProcessGroup) -> dict[str, Callable[[], None]]:
    """Return a step of each kind: forward, backward and averaging, without an optimizer."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"num_classes": 100, "in_channels": 3, "image_size": (32, 32)}
    network, other = (build_small_image_network(name, {}, **size) for _ in range(2))
    wrapped = DistributedDataParallel(other)
    images = torch.randn(BATCH_SIZE, 3, 32, 32)

    def own(*, early: bool) -> None:
        network.zero_grad()
        average = GradientAverage(list(network.parameters()), processes)
        with average.sent_early() if early else nullcontext():
            loss = network(images).square().mean()
            loss.backward()
        average.finish({"loss": loss.detach()})

    def ddp() -> None:
        wrapped.zero_grad()
        wrapped(images).square().mean().backward()

    return {"during": lambda: own(early=True), "after": lambda: own(early=False), "DDP": ddp}


def time_in_turn(runs: dict[str, Callable[[], None]], processes: ProcessGroup, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            processes.barrier()
            started = time.perf_counter()
            run()
            if number:  # the first round allocates
                found[name].append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
