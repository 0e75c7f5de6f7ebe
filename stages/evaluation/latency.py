"""Measure the latency of exported files on this machine's CPU, several in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.runtimes import Session, library_of, open_file

WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Latency:
    """The time of one batch in each round, in ms, with its median and 95th percentile (interpolated)."""

    rounds_ms: Sequence[float]

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.rounds_ms, 50))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.rounds_ms, 95))

    def to_json(self) -> dict[str, float]:
        return {"p50_ms": self.p50_ms, "p95_ms": self.p95_ms}


def measure_latency(
    paths: Mapping[str, Path],
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
    *,
    num_rounds: int,
    num_threads: int,
    between_rounds: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, Latency]]:
    """Measure the time of a batch of random images, by the file's name and the batch size.

    For each batch size the files take turns round by round, so that a machine that slows down slows all of them. Each
    timed run follows an untimed one of the same file, which warms up caches and cores, and the first `WARM_UP_ROUNDS`
    rounds are not counted.

    Args:
        paths: Files by name: ONNX, OpenVINO's IR (.xml), or ExecuTorch's program (.pte).
        image_shape: (C, H, W); None takes the shape that each file's input states.
        batch_sizes: Images per batch.
        num_rounds: Counted rounds.
        num_threads: Threads of the runtimes.
        between_rounds: Called before every round; may raise to stop.

    Raises:
        ModelError: Before any file is run, if one is missing, is no network, or has an input other than
            float32 [batch, C, H, W]; later, if one does not run on these images or batch sizes.
    """
    sessions = {name: open_file(path, num_threads) for name, path in paths.items()}
    shapes = {
        name: image_shape or _image_shape(paths[name], session, batch_sizes) for name, session in sessions.items()
    }
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in batch_sizes} for name in paths}
    for batch_size in batch_sizes:
        feeds = {name: _feed(session, (batch_size, *shapes[name])) for name, session in sessions.items()}
        for turn in range(-WARM_UP_ROUNDS, num_rounds):
            between_rounds()
            for name, session in sessions.items():
                run_ms = _run_ms(paths[name], session, feeds[name])
                if turn >= 0:
                    times[name][batch_size].append(run_ms)
    return {name: {size: Latency(rounds) for size, rounds in sizes.items()} for name, sizes in times.items()}


def _image_shape(path: Path, session: Session, batch_sizes: Sequence[int]) -> tuple[int, int, int]:
    """Return the (C, H, W) of a file's input. Raises ModelError if there is no such single input."""
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4:
        batch, channels, height, width = inputs[0].shape
        if isinstance(batch, int) and {*batch_sizes} != {batch}:
            raise ModelError(f"{path} takes batches of {batch} only, not of {', '.join(map(str, batch_sizes))}.")
        if all(isinstance(side, int) for side in (channels, height, width)):
            return channels, height, width
    found = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
    raise ModelError(
        f"{path} cannot be measured: its input is {found or 'missing'}, expected one of images, float32 "
        "[batch, C, H, W], with fixed C, H, W."
    )


def _feed(session: Session, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return {session.get_inputs()[0].name: images}


def _run_ms(path: Path, session: Session, feed: dict[str, np.ndarray]) -> float:
    try:
        session.run(None, feed)
        started = time.perf_counter()
        session.run(None, feed)
    except Exception as error:
        shape = list(next(iter(feed.values())).shape)
        raise ModelError(f"{library_of(path)} cannot run {path} on images {shape}: {cause(error)}") from error
    return 1000 * (time.perf_counter() - started)
