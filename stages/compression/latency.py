"""How long onnxruntime takes for a batch on this machine's CPU: several files in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from stages.compression.onnx_graph import session_options
from stages.errors import ModelError, cause

WARM_UP_ROUNDS = 3

Laps = dict[str, dict[int, list[float]]]
"""Milliseconds of each round, by the file's name and the batch size."""


@dataclass(frozen=True)
class Latency:
    """One batch's time over the rounds: the median, and what 95 % of the rounds stay below (interpolated), in ms."""

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
    """The latency of one batch for each ONNX file, by name, and each batch size; see `measure_laps`."""
    laps = measure_laps(
        paths,
        image_shape,
        batch_sizes,
        num_rounds=num_rounds,
        num_threads=num_threads,
        between_rounds=between_rounds,
    )
    return {name: {size: summarise(times) for size, times in sizes.items()} for name, sizes in laps.items()}


def summarise(laps_ms: Sequence[float]) -> Latency:
    p50, p95 = np.percentile(np.asarray(laps_ms), (50, 95))
    return Latency(float(p50), float(p95))


def measure_laps(
    paths: Mapping[str, Path],
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
    *,
    num_rounds: int,
    num_threads: int,
    between_rounds: Callable[[], None] = lambda: None,
) -> Laps:
    """Every round's milliseconds for a batch of random images, float32 [batch size, C, H, W]: name to batch size to ms.

    `image_shape` is (C, H, W); with None each file gets images of the shape that its own input states. For each batch
    size the files take turns round by round, so that a machine that slows down slows all of them. Each timed run
    follows an untimed one of the same file, which finds the caches and the cores as the file before left them, and the
    first `WARM_UP_ROUNDS` rounds are not counted.

    `between_rounds` is called before every round and may raise to end it. Raises ModelError if a file is missing, is
    no ONNX network, has more than one input or another than float32 [batch, C, H, W], or does not take these images
    or all of `batch_sizes`: one that was exported with a fixed batch size takes no other. All files are looked at
    before the first is run.
    """
    sessions = {name: _open(path, num_threads) for name, path in paths.items()}
    shapes = {name: _image_shape(paths[name], one, image_shape, batch_sizes) for name, one in sessions.items()}
    laps: Laps = {name: {size: [] for size in batch_sizes} for name in paths}
    for batch_size in batch_sizes:
        feeds = {name: _feed(session, (batch_size, *shapes[name])) for name, session in sessions.items()}
        for turn in range(-WARM_UP_ROUNDS, num_rounds):
            between_rounds()
            for name, session in sessions.items():
                lap_ms = _lap_ms(paths[name], session, feeds[name])
                if turn >= 0:
                    laps[name][batch_size].append(lap_ms)
    return laps


def _open(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    """A CPU session whose threads sleep where they wait, in a run and after it.

    By default they spin: within a run for the next operation, and after it onto the turn of the next file. Where cores
    are shared, that is what is measured then: on two busy ones, ResNet-18 at batch 16 took 90 ms and 35 ms in INT8
    spinning, 49 ms and 12 ms sleeping. A single thread has nobody to wait for and measures the same either way.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder, and no ONNX file.")
    if not path.is_file():
        raise ModelError(f"there is no ONNX file at {path}.")
    options = session_options(num_threads)
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:
        raise ModelError(f"onnxruntime cannot load {path}: {cause(fault)}") from fault


def _image_shape(
    path: Path,
    session: onnxruntime.InferenceSession,
    image_shape: tuple[int, int, int] | None,
    batch_sizes: Sequence[int],
) -> tuple[int, int, int]:
    """The (C, H, W) of the images that `path` is to be measured on. Raises ModelError if it does not take them."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs) or "none"
        raise ModelError(f"{path} has {len(inputs)} inputs ({names}): latency is measured of networks with one.")
    found = f"{inputs[0].name!r} {_typed(inputs[0])}"
    if inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise ModelError(f"the input of {path} is {found}; latency is measured with images, float32 [batch, C, H, W].")
    batch, *sides = inputs[0].shape
    if isinstance(batch, int) and any(size != batch for size in batch_sizes):
        wanted = ", ".join(map(str, batch_sizes))
        raise ModelError(
            f"{path} was exported with a fixed batch size and takes batches of {batch} only, not of {wanted}: "
            f"measure it with batch size {batch}, or export it with a batch axis of any size."
        )
    shape = image_shape or sides
    if not all(isinstance(side, int) for side in shape):
        raise ModelError(
            f"the input of {path} is {found}, which leaves open how large an image is: export it with fixed C, H, W."
        )
    if any(isinstance(own, int) and own != side for own, side in zip(sides, shape, strict=True)):
        raise ModelError(f"the input of {path} is {found}, which takes no images {list(shape)}.")
    channels, height, width = shape
    return channels, height, width


def _typed(value: onnxruntime.NodeArg) -> str:
    """An input's type and axes, for people: float [batch, 3, 32, 32]."""
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return f"{kind} [{', '.join('?' if side is None else str(side) for side in value.shape)}]"


def _feed(session: onnxruntime.InferenceSession, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return {session.get_inputs()[0].name: images}


def _lap_ms(path: Path, session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    try:
        session.run(None, feed)
        started = time.perf_counter()
        session.run(None, feed)
    except Exception as fault:
        shape = list(next(iter(feed.values())).shape)
        raise ModelError(f"onnxruntime cannot run {path} on images {shape}: {cause(fault)}") from fault
    return 1000 * (time.perf_counter() - started)
