"""Measure onnxruntime's latency on this machine's CPU, several files in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.onnx_session import open_session, session_options

WARM_UP_ROUNDS = 3

RoundTimes = dict[str, dict[int, list[float]]]
"""Milliseconds of each round, by the file's name and the batch size."""


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile (interpolated) of one batch's time over the rounds, in ms."""

    p50_ms: float
    p95_ms: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure_latency(
    paths: Mapping[str, Path],
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
    *,
    num_rounds: int,
    num_threads: int,
    between_rounds: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, Latency]]:
    """Return the latency of one batch for each ONNX file, by name, and each batch size; see `measure_rounds`."""
    times = measure_rounds(
        paths,
        image_shape,
        batch_sizes,
        num_rounds=num_rounds,
        num_threads=num_threads,
        between_rounds=between_rounds,
    )
    return {name: {size: summarize(rounds) for size, rounds in sizes.items()} for name, sizes in times.items()}


def summarize(times_ms: Sequence[float]) -> Latency:
    p50, p95 = np.percentile(np.asarray(times_ms), (50, 95))
    return Latency(float(p50), float(p95))


def measure_rounds(
    paths: Mapping[str, Path],
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
    *,
    num_rounds: int,
    num_threads: int,
    between_rounds: Callable[[], None] = lambda: None,
) -> RoundTimes:
    """Measure the time of a batch of random images, float32 [batch size, C, H, W], in every round.

    For each batch size the files take turns round by round, so that a machine that slows down slows all of them. Each
    timed run follows an untimed one of the same file, which warms up caches and cores, and the first `WARM_UP_ROUNDS`
    rounds are not counted.

    Args:
        paths: ONNX files by name.
        image_shape: (C, H, W); None takes the shape that each file's input states.
        batch_sizes: Images per batch.
        num_rounds: Counted rounds.
        num_threads: Threads of onnxruntime.
        between_rounds: Called before every round; may raise to stop.

    Raises:
        ModelError: Before any file is run, if one is missing, is not an ONNX network, has more than one input or one
            other than float32 [batch, C, H, W], or does not take these images or all of `batch_sizes`.
    """
    sessions = {name: _open(path, num_threads) for name, path in paths.items()}
    shapes = {name: _image_shape(paths[name], one, image_shape, batch_sizes) for name, one in sessions.items()}
    times: RoundTimes = {name: {size: [] for size in batch_sizes} for name in paths}
    for batch_size in batch_sizes:
        feeds = {name: _feed(session, (batch_size, *shapes[name])) for name, session in sessions.items()}
        for turn in range(-WARM_UP_ROUNDS, num_rounds):
            between_rounds()
            for name, session in sessions.items():
                run_ms = _run_ms(paths[name], session, feeds[name])
                if turn >= 0:
                    times[name][batch_size].append(run_ms)
    return times


def _open(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    """Open a CPU session whose threads sleep while waiting, in a run and after it.

    By default they spin: within a run for the next operation, and after it into the turn of the next file. On shared
    cores that distorts the measurement: on two busy ones, ResNet-18 at batch 16 took 90 ms and 35 ms in INT8 spinning,
    49 ms and 12 ms sleeping. A single thread measures the same either way.
    """
    options = session_options(num_threads)
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return open_session(path, options)


def _image_shape(
    path: Path,
    session: onnxruntime.InferenceSession,
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
) -> tuple[int, int, int]:
    """Return the (C, H, W) of the images to measure `path` on. Raises ModelError if it does not take them."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs) or "none"
        raise ModelError(f"{path} has {len(inputs)} inputs ({names}): only networks with one can be measured.")
    found = f"{inputs[0].name!r} {_typed(inputs[0])}"
    if inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise ModelError(f"the input of {path} is {found}; only images, float32 [batch, C, H, W], can be measured.")
    batch, *sides = inputs[0].shape
    if isinstance(batch, int) and any(size != batch for size in batch_sizes):
        wanted = ", ".join(map(str, batch_sizes))
        raise ModelError(
            f"{path} was exported with a fixed batch size and takes batches of {batch} only, not of {wanted}: "
            f"measure it with batch size {batch}, or export it with a dynamic batch axis."
        )
    shape = image_shape or sides
    if not all(isinstance(side, int) for side in shape):
        raise ModelError(f"the input of {path} is {found}, without a fixed image size: export it with fixed C, H, W.")
    if any(isinstance(own, int) and own != side for own, side in zip(sides, shape, strict=True)):
        raise ModelError(f"the input of {path} is {found}, which does not take images {list(shape)}.")
    channels, height, width = shape
    return channels, height, width


def _typed(value: onnxruntime.NodeArg) -> str:
    """Format an input's type and axes: float [batch, 3, 32, 32]."""
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return f"{kind} [{', '.join('?' if side is None else str(side) for side in value.shape)}]"


def _feed(session: onnxruntime.InferenceSession, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return {session.get_inputs()[0].name: images}


def _run_ms(path: Path, session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    try:
        session.run(None, feed)
        started = time.perf_counter()
        session.run(None, feed)
    except Exception as error:
        shape = list(next(iter(feed.values())).shape)
        raise ModelError(f"onnxruntime cannot run {path} on images {shape}: {cause(error)}") from error
    return 1000 * (time.perf_counter() - started)
