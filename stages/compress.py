"""Stage 3, `kdpipe compress`: prune the distilled student, take it to INT8, teach it from the stores all the while."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from stages.compression.latency import measure_latency
from stages.compression.prune import PruneConfig, prune
from stages.compression.quantize import calibrate, freeze_observers, prepare_qat
from stages.compression.widths import apply_widths, record_widths
from stages.config import section
from stages.job_folder import JobFolder, read_json, write_json
from stages.lesson import Lesson
from stages.losses.simkd import SimKDConfig
from stages.losses.terms import student_layers
from stages.model_file import finished_record, load_finished
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.reuse_classifier import last_of_projector
from stages.setup import Setup, deciding
from stages.teaching import Teaching
from stages.train_student import ALONE, DISTILLED, StudentConfig, build_lesson, fresh_student, student_folder
from stages.training import Job, train


@section
class QuantizeConfig:
    """INT8 quantization-aware training.

    calibration_batches: batches of training views from which the first ranges of the activations are taken.
    freeze_after: the share of the epochs after which those ranges stay as they are.
    """

    calibration_batches: Annotated[int, Field(ge=1)] = 8
    freeze_after: Annotated[float, Field(ge=0, le=1)] = 0.67


@section
class CompressConfig:
    """How the distilled students are made small: pruned, then quantized, each with its own fine-tuning.

    steps: which of the two are done, always in this order.
    latency_batch_size: images in the batch whose latency is reported.
    """

    steps: Annotated[tuple[Literal["prune", "quantize"], ...], Field(min_length=1)] = ("prune", "quantize")
    prune: PruneConfig = Field(default_factory=PruneConfig)
    prune_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=10, lr=0.01))
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    quantize_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=5, lr=0.001))
    latency_batch_size: Annotated[int, Field(ge=1)] = 64
    latency_rounds: Annotated[int, Field(ge=3)] = 50


@dataclass(frozen=True)
class Piece:
    """One fine-tuning of this stage: what it starts from, where it goes, and what else decides its result."""

    name: str
    network: Network
    folder: JobFolder
    config: TrainConfig
    decided_by: Mapping[str, Any]
    seed: int


def compressed_folder(run: Path, kind: str, seed: int) -> JobFolder:
    """The folder of a `pruned` or `int8` student."""
    return JobFolder(run / "compressed" / f"{kind}-seed{seed}")


def compress(
    config: CompressConfig, student: StudentConfig, seed: int, teaching: Teaching, setup: Setup
) -> dict[str, dict[str, Any]]:
    """Prune and quantize the distilled student of a seed, as `config.steps` says; returns the figures of each.

    Each step resumes where it was stopped, and a finished one is not touched. Raises RunError where the student is
    not trained yet, ModelError where it cannot be pruned or quantized or the exported file does not agree with torch.
    """
    folder = student_folder(setup.run, DISTILLED, seed)
    network = fresh_student(student, seed, setup, teaching.losses)
    load_finished(folder, network.model, network.architecture, "kdpipe train-student")
    figures = {}
    if "prune" in config.steps:
        figures["pruned"] = _prune(config, network, seed, teaching, setup)
        network = _load_pruned(fresh_student(student, seed, setup, teaching.losses), seed, setup)
    if "quantize" in config.steps:
        figures["int8"] = _quantize(config, network, seed, teaching, setup)
    return figures


def rehearse(config: CompressConfig, student: StudentConfig, setup: Setup) -> None:
    """Prune and prepare an untrained student: what cannot be compressed is refused before anything is trained."""
    model, example = fresh_student(student, student.seeds[0], setup).model, torch.zeros(2, *setup.image_shape)
    if "prune" in config.steps:
        model = prune(model, example, config.prune)
    if "quantize" in config.steps:
        prepare_qat(model, example)


def measure_latencies(config: CompressConfig, seed: int, setup: Setup) -> dict[str, Any]:
    """Median milliseconds of one batch in onnxruntime, teacher to INT8 student, in turn in one process."""
    record = setup.run / "compressed" / "latency.json"
    files = {
        "teacher": setup.run / "teacher" / "model.onnx",
        "student": student_folder(setup.run, DISTILLED, seed).onnx,
        **_alone(setup, seed),
        "pruned": compressed_folder(setup.run, "pruned", seed).onnx,
        "int8": compressed_folder(setup.run, "int8", seed).onnx,
    }
    present = {name: path for name, path in files.items() if path.exists()}
    measured_on = {
        "batch_size": config.latency_batch_size,
        "num_threads": torch.get_num_threads(),
        "files_sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()},
    }
    held = read_json(record) or {}
    if {key: held.get(key) for key in measured_on} == measured_on:
        return held
    median_ms = measure_latency(
        present,
        setup.image_shape,
        config.latency_batch_size,
        config.latency_rounds,
        torch.get_num_threads(),
        between_rounds=setup.watch.check,
    )
    write_json(record, measured_on | {"median_ms": median_ms})
    return measured_on | {"median_ms": median_ms}


def _alone(setup: Setup, seed: int) -> dict[str, Path]:
    """The student alone, where it is another network than the distilled one (SimKD's has a projector)."""
    alone, distilled = (student_folder(setup.run, kind, seed) for kind in (ALONE, DISTILLED))
    sizes = [(folder.result() or {}).get("num_parameters") for folder in (alone, distilled)]
    return {"alone": alone.onnx} if sizes[0] != sizes[1] else {}


def _prune(config: CompressConfig, network: Network, seed: int, teaching: Teaching, setup: Setup) -> dict[str, Any]:
    config = replace(config, prune=replace(config.prune, keep=(*config.prune.keep, *_reused(teaching))))
    model = prune(network.model, torch.zeros(2, *setup.image_shape), config.prune)
    architecture = {**network.architecture, "widths": record_widths(model)}
    piece = Piece(
        name=f"pruned student, seed {seed}",
        network=Network(model, architecture, network.normalise),
        folder=compressed_folder(setup.run, "pruned", seed),
        config=config.prune_train,
        decided_by={"prune": deciding(config.prune), "starts_from": network.identity},
        seed=seed,
    )
    return _fine_tune(piece, teaching, setup)


def _reused(teaching: Teaching) -> list[str]:
    """The modules whose channels stay as they are what the teacher's own classifier sees."""
    return [last_of_projector(loss) for loss in teaching.losses if isinstance(loss, SimKDConfig)]


def _quantize(config: CompressConfig, network: Network, seed: int, teaching: Teaching, setup: Setup) -> dict[str, Any]:
    prepared = prepare_qat(network.model, torch.zeros(2, *setup.image_shape))
    piece = Piece(
        name=f"int8 student, seed {seed}",
        network=Network(prepared, {**network.architecture, "quantized": "int8"}, network.normalise),
        folder=compressed_folder(setup.run, "int8", seed),
        config=config.quantize_train,
        decided_by={"quantize": deciding(config.quantize), "starts_from": network.identity},
        seed=seed,
    )
    freeze_at = round(config.quantize.freeze_after * config.quantize_train.epochs)

    def before_epoch(model: nn.Module, epoch: int) -> None:
        if epoch >= freeze_at:
            freeze_observers(model)

    def warm_up(model: nn.Module, lesson: Lesson) -> None:
        _calibrate(config, model, lesson, seed)

    return _fine_tune(piece, teaching, setup, warm_up, before_epoch)


def _fine_tune(
    piece: Piece,
    teaching: Teaching,
    setup: Setup,
    warm_up: Callable[[nn.Module, Lesson], None] = lambda model, lesson: None,
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None,
) -> dict[str, Any]:
    """Train one piece with the run's distillation losses, check its ONNX file, and return its figures."""
    piece.folder.begin(
        {
            **piece.decided_by,
            "train": deciding(piece.config),
            "seed": piece.seed,
            "data": setup.data_identity(),
            "test": setup.test_identity(),
            "views": setup.shown_views(),
            "teaching": teaching.to_json(),
        }
    )
    if (done := piece.folder.result()) is not None:
        return done
    model = piece.network.model.to(setup.device)
    lesson = build_lesson(piece.network, teaching.main, piece.seed, setup, settled=True)
    if not piece.folder.checkpoint.exists():
        warm_up(model, lesson)
    test = setup.test(piece.network.normalise)
    layers = student_layers(teaching.main.losses)
    job = Job("compress", piece.name, model, lesson, test, piece.config, piece.seed, piece.folder, layers, before_epoch)
    return finish(piece.folder, piece.network, train(job, setup.device, setup.watch), setup)


def _load_pruned(network: Network, seed: int, setup: Setup) -> Network:
    """The finished pruned student: built by the recipe, cut to the recorded widths, filled with the stored weights."""
    folder = compressed_folder(setup.run, "pruned", seed)
    widths = finished_record(folder, "kdpipe compress")["architecture"].get("widths", {})
    model = apply_widths(network.model, widths)
    architecture = {**network.architecture, "widths": widths}
    load_finished(folder, model, architecture, "kdpipe compress")
    return Network(model, architecture, network.normalise)


def _calibrate(config: CompressConfig, model: nn.Module, lesson: Lesson, seed: int) -> None:
    """Take the first ranges of the activations from the views of the first batches."""
    batches = lesson.stream(seed, config.quantize_train.batch_size, epoch=0, step=0, epochs=1)
    calibrate(model, (batch.images for batch in islice(batches, config.quantize.calibration_batches)))
