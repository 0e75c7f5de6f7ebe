"""How long onnxruntime takes for a batch on this machine's CPU: several files in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np

from stages.compression.onnx_file import open_session

WARM_UP_ROUNDS = 3


def measure_latency(
    paths: Mapping[str, Path],
    image_shape: tuple[int, int, int],
    batch_size: int,
    num_rounds: int,
    num_threads: int,
    *,
    between_rounds: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The median latency in ms of one batch [batch_size, C, H, W] for each ONNX file, by name.

    The files take turns round by round, so that a machine that slows down slows all of them. Each timed run follows an
    untimed one of the same file, which finds the caches and the cores as the file before left them. `between_rounds`
    may raise to end it. Raises ModelError
    if a file is missing or is no ONNX network.
    """
    images = np.random.default_rng(0).standard_normal((batch_size, *image_shape), dtype=np.float32)
    sessions = {name: open_session(path, num_threads=num_threads) for name, path in paths.items()}
    laps: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(-WARM_UP_ROUNDS, num_rounds):
        between_rounds()
        for name, session in sessions.items():
            feed = {session.get_inputs()[0].name: images}
            session.run(None, feed)
            started = time.perf_counter()
            session.run(None, feed)
            if turn >= 0:
                laps[name].append(time.perf_counter() - started)
    return {name: 1000 * median(times) for name, times in laps.items()}
