"""A student taken to integers: calibrated, and fine-tuned while it rounds as its file will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from stages.compression.int4_layers import prepare_int4
from stages.compression.quantize import calibrate, freeze_observers, prepare_qat
from stages.compression.sparsity import masks_of
from stages.config import Count, section
from stages.fine_tune import Piece, Tutor, fine_tune
from stages.lesson import Lesson
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.prune_student import Source


@section
class QuantizeConfig:
    """To which integers, and how a student is fine-tuned on their grid.

    scheme: "int8" rounds weights and activations of all that onnxruntime computes in integers; "int4" the weights of
    linear layers alone, in blocks of block_size.
    exclude: module paths, layers or whole blocks, that stay float; `kdpipe sensitivity` finds which are worth it.
    calibration_batches: batches of training views from which the first ranges of the activations are taken.
    freeze_observers_after_epoch: the share of the epochs after which those ranges stay as they are.
    """

    scheme: Literal["int8", "int4"] = "int8"
    block_size: Literal[16, 32, 64, 128] = 32
    exclude: tuple[str, ...] = ()
    calibration_batches: Count = 8
    freeze_observers_after_epoch: Annotated[float, Field(ge=0, le=1)] = 0.67


def quantize_json(config: QuantizeConfig) -> dict[str, Any]:
    """What decides a quantization; younger keys are left out where they are as they would be without them."""
    record, plain = asdict(config), asdict(QuantizeConfig())
    if config.scheme != "int4":
        del record["block_size"]
    first = ("calibration_batches", "freeze_observers_after_epoch")
    return {key: value for key, value in record.items() if key in first or value != plain[key]}


def prepare(model: nn.Module, image_shape: tuple[int, int, int], config: QuantizeConfig) -> nn.Module:
    """A copy of a float network that rounds as `config` says. Raises ModelError where it cannot."""
    example = torch.zeros(2, *image_shape)
    if config.scheme == "int4":
        return prepare_int4(model, example, block_size=config.block_size, exclude=config.exclude)
    return prepare_qat(model, example, exclude=config.exclude)


def quantized_record(config: QuantizeConfig) -> dict[str, Any]:
    """What the record of an architecture says of its quantization: from it `prepare` builds the same network again."""
    record: dict[str, Any] = {"quantized": config.scheme}
    if config.exclude:
        record["exclude"] = list(config.exclude)
    if config.scheme == "int4":
        record["block_size"] = config.block_size
    return record


def config_of(architecture: Mapping[str, Any]) -> QuantizeConfig | None:
    """The other way round; None for a float network."""
    if "quantized" not in architecture:
        return None
    return QuantizeConfig(
        scheme=architecture["quantized"],
        exclude=tuple(architecture.get("exclude", ())),
        block_size=architecture.get("block_size", 32),
    )


def quantize_student(
    config: QuantizeConfig, train: TrainConfig, tutor: Tutor, source: Source, kind: str, *, sparse: bool = False
) -> dict[str, Any]:
    """Quantize a finished network, fine-tune it, and return its figures; without epochs it is calibrated only.

    kind: the name of its folder. sparse: weights that are zero stay zero.
    Resumes where it was stopped, and a finished one is not touched. Raises ModelError where it cannot be quantized.
    """
    folder = tutor.folder(kind)
    folder.begin(quantize_job(config, train, tutor, source))
    if (done := folder.result()) is not None:
        return done
    network = source.load()
    prepared = prepare(network.model, tutor.setup.image_shape, config)
    rounding = Network(prepared, {**network.architecture, **quantized_record(config)}, network.normalise)
    freeze_at = round(config.freeze_observers_after_epoch * train.epochs)

    def before_epoch(model: nn.Module, epoch: int) -> None:
        if config.scheme == "int8" and epoch >= freeze_at:
            freeze_observers(model)

    def warm_up(model: nn.Module, lesson: Lesson) -> None:
        if config.scheme == "int8":
            batches = lesson.stream(tutor.seed, train.batch_size, epoch=0, step=0, epochs=1)
            calibrate(model, (batch.images for batch in islice(batches, config.calibration_batches)))

    masks = masks_of(prepared) if sparse else {}
    piece = Piece(f"{kind} student, seed {tutor.seed}", rounding, folder, train, warm_up, before_epoch, masks)
    history = fine_tune(piece, tutor)
    return finish(folder, rounding, history, tutor.setup, with_onnx=tutor.handed_out)


def quantize_job(config: QuantizeConfig, train: TrainConfig, tutor: Tutor, source: Source) -> dict[str, Any]:
    """What decides the result."""
    return tutor.made_from({"quantize": quantize_json(config)}, source.identity, train)


def calibrated_only(train: TrainConfig) -> TrainConfig:
    """No fine-tuning at all: what quantization-aware training is compared with."""
    return replace(train, epochs=0)
