"""Quantize a student: calibrate it, then fine-tune it while it rounds as its file does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.compress.fine_tune import FineTuneContext, FineTuneJob, fine_tune
from kdpipe.stages.compress.pruning.sparsity import masks_of
from kdpipe.stages.compress.quantization.bit_widths import choose_int4, require_reachable
from kdpipe.stages.compress.quantization.fx_trace import UntraceableError
from kdpipe.stages.compress.quantization.int4 import prepare_int4
from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized, calibrate_onnx
from kdpipe.stages.compress.quantization.qat import calibrate, freeze_observers, int4_candidates, prepare_qat
from kdpipe.stages.compress.resume import TrainedModel
from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.config import Count, section
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.tokens import HEADLESS, is_headless
from kdpipe.stages.models.weights.state_dict import count_parameters
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store.fs.checksums import remove_with_sum

INT4_LAYERS = "int4_layers"
"""The key of a recorded architecture with the layers whose weights have 4 bits, if a budget chose them."""


@section
class QuantizeConfig:
    """Configuration of quantization and its fine-tuning.

    Attributes:
        scheme: "int8" rounds weights and activations of everything that onnxruntime computes in integers; "w4a8" the
            same with weights of 4 bits in all layers but the first and the last; "int4" only the weights of linear
            layers, in blocks of block_size.
        budget: with "w4a8" the bytes of the weights, as a share of those in INT8: so many layers have 4 bits that they
            are met, those first whose rounding moves the logits least for what it saves; None for all layers.
        step_size: how the scales of weights and activations are found: "observed", from the largest weights and from
            the range of the activations, or "learned" with the weights (LSQ); not in "int4".
        exclude: module paths, layers or whole blocks, that stay float; `kdpipe sensitivity` finds candidates.
        quantizer: "torch" trains the rounded network, which torch.fx must trace; "onnxruntime" only calibrates its ONNX
            file; "auto" takes torch, and onnxruntime for networks that torch.fx cannot trace. For "int8" alone.
        calibration_batches: batches of training views that set the first ranges of the activations.
        freeze_observers_after_epoch: the share of the epochs after which those ranges are frozen.
    """

    scheme: Literal["int8", "w4a8", "int4"] = "int8"
    block_size: Literal[16, 32, 64, 128] = 32
    budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    step_size: Literal["observed", "learned"] = "observed"
    exclude: tuple[str, ...] = ()
    quantizer: Literal["auto", "torch", "onnxruntime"] = "auto"
    calibration_batches: Count = 8
    freeze_observers_after_epoch: Annotated[float, Field(ge=0, le=1)] = 0.67

    def __post_init__(self) -> None:
        if self.budget is not None and self.scheme != "w4a8":
            raise ValueError("budget is for scheme = 'w4a8', whose layers have 4 or 8 bits")
        if self.scheme == "int4" and self.step_size == "learned":
            raise ValueError("step_size = 'learned' is not for scheme = 'int4', whose scales follow from its weights")
        if self.quantizer == "onnxruntime" and (self.scheme, self.step_size) != ("int8", "observed"):
            raise ValueError("quantizer = 'onnxruntime' only calibrates, in scheme = 'int8': leave out step_size")


def quantize_json(config: QuantizeConfig) -> dict[str, Any]:
    """Return the settings that determine a quantization's result."""
    record = asdict(config)
    if config.scheme != "int4":
        del record["block_size"]
    if config.step_size == "observed":  # later than the first runs
        del record["step_size"]
    if config.budget is None:
        del record["budget"]
    if config.quantizer == "auto":
        del record["quantizer"]
    return record


def prepare(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    config: QuantizeConfig,
    grid: Grid = "affine",
    int4: Sequence[str] | None = None,
) -> nn.Module:
    """Return a copy of a float network that rounds as configured, or an empty OnnxQuantized to calibrate.

    Layers at `int4` have 4 bits, by default all that can.

    Raises:
        ModelError: If it cannot be quantized.
    """
    prepared: nn.Module
    example = torch.zeros(2, *image_shape)
    if config.scheme == "int4":
        prepared = prepare_int4(model, example, block_size=config.block_size, exclude=config.exclude)
    elif config.quantizer == "onnxruntime":
        prepared = OnnxQuantized()
    else:
        try:
            candidates = int4_candidates(model, example, config.exclude) if config.scheme == "w4a8" else []
            int4 = candidates if int4 is None else int4
            prepared = prepare_qat(
                model, example, config.exclude, grid, int4=int4, learns_steps=config.step_size == "learned"
            )
        except UntraceableError as error:
            if config.quantizer == "torch" or (config.scheme, config.step_size) != ("int8", "observed"):
                raise
            prepared = OnnxQuantized(error.reason)
        if config.budget is not None:
            require_reachable(prepared, candidates, config.budget)
    setattr(prepared, HEADLESS, is_headless(model))  # a traced network loses it
    return prepared


def quantized_record(
    config: QuantizeConfig, prepared: nn.Module, grid: Grid = "affine", int4: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the entries of a prepared network in an architecture record; `config_of` restores it, but for the grid.

    The layers at `int4`, None without a budget, are "int4_layers".
    """
    record: dict[str, Any] = {"quantized": config.scheme}
    if config.exclude:
        record["exclude"] = list(config.exclude)
    if config.scheme == "int4":
        record["block_size"] = config.block_size
    if config.step_size == "learned":
        record["step_size"] = config.step_size
    if int4 is not None:
        record[INT4_LAYERS] = list(int4)
    if isinstance(prepared, OnnxQuantized):
        record["quantizer"] = "onnxruntime"
    return record | ({} if grid == "affine" else {"grid": grid})


def config_of(architecture: Mapping[str, Any]) -> QuantizeConfig | None:
    """Return the quantization in an architecture record; None for a float network."""
    if "quantized" not in architecture:
        return None
    return QuantizeConfig(
        scheme=architecture["quantized"],
        exclude=tuple(architecture.get("exclude", ())),
        block_size=architecture.get("block_size", 32),
        step_size=architecture.get("step_size", "observed"),
        quantizer=architecture.get("quantizer", "auto"),
    )


def quantize_student(
    config: QuantizeConfig,
    train: TrainConfig,
    fine_tuning: FineTuneContext,
    source: TrainedModel,
    kind: str,
    *,
    name: str,
    sparse: bool = False,
    grid: Grid = "affine",
) -> dict[str, Any]:
    """Quantize a finished network, fine-tune it, and return its figures; without epochs it is only calibrated.

    A stopped job resumes; a finished one is left untouched. `kind` names its folder, `name` its progress. With
    `sparse`, zero weights stay zero; `grid` is that of the activations in INT8.

    Raises:
        ModelError: If it cannot be quantized.
    """
    folder = fine_tuning.job_dir(kind)
    folder.begin(quantize_fingerprint(config, train, fine_tuning, source, grid))
    if (done := folder.result()) is not None:
        remove_with_sum(_choice_path(folder))  # left by a kill just before the removal below
        return done
    network = source.load()
    test = fine_tuning.evaluation(network.normalize)
    chosen = _chosen(config, fine_tuning, network, folder, batch_size=train.batch_size, grid=grid, name=name)
    int4 = chosen[INT4_LAYERS] if chosen else None
    prepared = prepare(network.model, test.image_shape, config, grid, int4)
    architecture = {**network.architecture, **quantized_record(config, prepared, grid, int4)}
    quantized = ModelBundle(prepared, architecture, network.normalize)
    if isinstance(prepared, OnnxQuantized):
        batches = calibration_images(config, train, fine_tuning, network)
        calibrate_onnx(
            prepared, network.model, batches, image_shape=test.image_shape, exclude=config.exclude, grid=grid
        )
        if prepared.reason and kind == config.scheme:  # once for all networks of a seed
            fine_tuning.monitor.warn(
                "compress",
                f"{name}, seed {fine_tuning.seed}: torch.fx cannot trace {prepared.reason}; calibrated by onnxruntime "
                "instead, without quantization-aware training.",
            )
        return _finish_onnx(quantized, network, folder, fine_tuning)
    freeze_at = round(config.freeze_observers_after_epoch * train.epochs)

    def before_epoch(model: nn.Module, epoch: int) -> None:
        if config.scheme != "int4" and epoch >= freeze_at:
            freeze_observers(model)

    def warm_up(model: nn.Module, task: TrainingTask) -> None:
        if config.scheme != "int4":
            calibrate(model, _images(config, train, fine_tuning, task))

    masks = masks_of(prepared) if sparse else {}
    adapters = source.adapters if fine_tuning.spec else {}
    exact = replace(train, precision="float32")  # rounding before the quantizers would move codes
    job = FineTuneJob(
        f"{name}, seed {fine_tuning.seed}", quantized, folder, exact, warm_up, before_epoch, masks, adapters
    )
    history, _ = fine_tune(job, fine_tuning)
    figures = finalize(
        folder,
        quantized,
        history,
        test,
        with_onnx=fine_tuning.exports_onnx,
        more={**fine_tuning.examine(quantized), **chosen},
        validation=fine_tuning.validation(network.normalize),
    )
    remove_with_sum(_choice_path(folder))
    return figures


def _choice_path(folder: JobDir) -> Path:
    return folder.path / "int4_layers.json"


def _chosen(
    config: QuantizeConfig,
    fine_tuning: FineTuneContext,
    network: ModelBundle,
    folder: JobDir,
    *,
    batch_size: int,
    grid: Grid,
    name: str,
) -> dict[str, Any]:
    """Return the layers with weights of 4 bits under the budget, and the harm of each; empty without a budget.

    They are chosen once and saved, so that a stopped job goes on with the same ones.
    """
    if config.budget is None:
        return {}
    if (saved := read_json_file(_choice_path(folder))) is not None:
        return saved
    test = fine_tuning.evaluation(network.normalize)
    batches = fine_tuning.task(network).stream(fine_tuning.seed, batch_size, epoch=0, step=0, epochs=1)
    images = [batch.images.cpu() for batch in islice(batches, config.calibration_batches)]
    example, model = torch.zeros(2, *test.image_shape), network.model.cpu()
    layers, harms = choose_int4(
        prepare_qat(model, example, config.exclude, grid),
        int4_candidates(model, example, config.exclude),
        images,
        budget=config.budget,
        task=test.task,
        on_progress=fine_tuning.monitor.counter("compress", f"{name}: layers with 4 bits", "layer"),
    )
    chosen = {INT4_LAYERS: layers, "kl_of_4_bits": harms}
    write_json_file(_choice_path(folder), chosen)
    return chosen


def calibration_images(
    config: QuantizeConfig, train: TrainConfig, fine_tuning: FineTuneContext, network: ModelBundle
) -> Iterator[Tensor]:
    """Yield the first batches of the fine-tuning of `network`: normalized images [B, C, H, W]."""
    network.model.to(fine_tuning.device)
    return _images(config, train, fine_tuning, fine_tuning.task(network))


def _images(
    config: QuantizeConfig, train: TrainConfig, fine_tuning: FineTuneContext, task: TrainingTask
) -> Iterator[Tensor]:
    batches = task.stream(fine_tuning.seed, train.batch_size, epoch=0, step=0, epochs=1)
    return (batch.images for batch in islice(batches, config.calibration_batches))


def _finish_onnx(
    quantized: ModelBundle, network: ModelBundle, folder: JobDir, fine_tuning: FineTuneContext
) -> dict[str, Any]:
    """Evaluate and write a network that onnxruntime quantized from `network`, held against that one.

    Its `onnx_agreement` is the share of the whole test set on which its top-1 is that of the float network.
    """
    assert isinstance(quantized.model, OnnxQuantized)
    test = fine_tuning.evaluation(network.normalize)
    with TemporaryDirectory() as temporary:
        path, example = Path(temporary) / "model.onnx", torch.zeros(2, *test.image_shape)
        export_onnx(quantized.model, example, path, metadata={})
        found = check_onnx(path, network.model, test.batches(None), test.warn, test.task)
    against_float = {
        "onnx_agreement": found.agreement if fine_tuning.exports_onnx else None,
        "max_logit_difference": found.max_logit_difference,
    }
    return finalize(
        folder,
        quantized,
        [],
        test,
        with_onnx=fine_tuning.exports_onnx,
        more={
            **fine_tuning.examine(quantized),
            "num_parameters": count_parameters(network.model),
            "num_macs": count_macs(network.model, test.image_shape),
            "quantizer": "onnxruntime",
            **({"untraceable": quantized.model.reason} if quantized.model.reason else {}),
            **against_float,
        },
        validation=fine_tuning.validation(network.normalize),
    )


def quantize_fingerprint(
    config: QuantizeConfig, train: TrainConfig, fine_tuning: FineTuneContext, source: TrainedModel, grid: Grid
) -> dict[str, Any]:
    """Return everything that determines the result."""
    settings = quantize_json(config) | ({} if grid == "affine" else {"grid": grid})
    return fine_tuning.fingerprint({"quantize": settings}, source, train)
