"""Stage 3, `kdpipe compress`: prune and quantize the distilled student with distillation, and its baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from kdpipe.stages.compress.external_student import load_external, measure_external
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.names import compressed_name, network_name
from kdpipe.stages.compress.prune_student import prune_fingerprint, prune_student, ranking_losses
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Ranker
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized, calibrate_onnx
from kdpipe.stages.compress.quantization.qat import calibrate
from kdpipe.stages.compress.quantization.sensitivity import LayerSensitivity, sensitivity
from kdpipe.stages.compress.quantize_student import QuantizeConfig, prepare, quantize_student
from kdpipe.stages.compress.resume import TrainedModel, finished_source
from kdpipe.stages.compress.targets import GRIDS, TARGETS, Grid, Target, quantized_grids, targets_of
from kdpipe.stages.config import PathStr, section, unique
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.tasks import EMBEDDING
from kdpipe.stages.distillation.classifier_reuse import projector_output_path
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ANOTHER_RUN, ModelError
from kdpipe.stages.export.trial import try_export
from kdpipe.stages.faults import with_message
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.runtime.versions import require_library
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.preflight import try_batches
from kdpipe.stages.training.saved_model import finished_record
from kdpipe.store import FingerprintMismatch, differences

Step = Literal["prune", "quantize", "export"]


STEPS: tuple[Step, ...] = ("prune", "quantize", "export")
"""The steps of `kdpipe compress`, in order."""


@section
class CompressConfig:
    """Configuration of compression: prune, then quantize, each with its own fine-tuning, and export.

    Attributes:
        steps: which of the two are done, always in this order; without either, a student is exported unchanged.
        baselines: whether to make the baselines too: the student quantized without pruning, only calibrated, and every
            fine-tuning repeated with hard labels alone.
        student: a file with the weights of a student trained elsewhere, used in place of the distilled ones.
        target: the runtimes that the files are for, one or several: "onnxruntime", "openvino", "executorch",
            "tensorrt". The first one decides how INT8 rounds; one that rounds otherwise gets a network of its own.
        float16: whether to write an FP16 ONNX file for GPUs beside that of each float network.
        opset: of the exported ONNX files; by default the exporter's own.
        latency_batch_sizes: batch sizes whose latency is reported.
        niceness: how much this stage, long CPU work, lowers its scheduling priority.
    """

    steps: tuple[Literal["prune", "quantize"], ...] = ("prune", "quantize")
    baselines: bool = True
    student: PathStr | None = None
    target: Annotated[
        Target | Annotated[tuple[Target, ...], Field(min_length=1), AfterValidator(unique)], with_message(TARGETS)
    ] = "onnxruntime"
    prune: PruneConfig = Field(default_factory=PruneConfig)
    prune_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=10, lr=0.01))
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    quantize_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=5, lr=0.001))
    float16: bool = False
    opset: Annotated[int, Field(ge=1, le=1000)] | None = None
    latency_batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1), AfterValidator(unique)
    ] = (1, 64)
    latency_rounds: Annotated[int, Field(ge=3, le=10**6)] = 50
    niceness: Annotated[int, Field(ge=0, le=19)] = 10

    @property
    def prunes(self) -> bool:
        return "prune" in self.steps

    @property
    def quantizes(self) -> bool:
        return "quantize" in self.steps

    def __post_init__(self) -> None:
        if self.quantizes and self.quantize.scheme == "int4" and self.targets != ("onnxruntime",):
            raise ValueError("quantize.scheme = 'int4' is for target = 'onnxruntime' alone: no other takes its file")
        others = {*self.targets} - {"onnxruntime", "openvino"}
        if self.quantizes and self.quantize.scheme == "w4a8" and others:
            raise ValueError(
                f"quantize.scheme = 'w4a8' is for 'onnxruntime' and 'openvino', not for target = {min(others)!r}: "
                "choose scheme = 'int8', or another target"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        return targets_of(self.target)

    @property
    def grids(self) -> dict[str, Grid]:
        """The quantized networks at the end of the chain, one for each grid of activations, the main one first."""
        return quantized_grids(self.quantize.scheme, self.targets) if self.quantizes else {}

    @property
    def grid(self) -> Grid:
        """The grid of the main one, and of its baselines."""
        return GRIDS[self.targets[0]]

    @property
    def kinds(self) -> list[str]:
        """The networks of the chain, the student first."""
        return ["student", *["pruned"] * self.prunes, *[self.quantize.scheme] * self.quantizes]


def compressed_root(run: Path, config: CompressConfig) -> Path:
    """Return the folder of a run's compressed students; for an external student it has that one's name."""
    return run / compressed_name(config.student)


def compress(
    config: CompressConfig, fine_tuning: FineTuneContext, *, only: Sequence[Step] = STEPS
) -> dict[str, dict[str, Any]]:
    """Prune and quantize a student and return the figures of each network made.

    `pruned` and `int8` (or another scheme) are the chain itself, `int8-TARGET` its end for a target with another grid;
    of its baselines, "-unpruned" is the student quantized without pruning, "-ptq" the same only calibrated, and
    "-alone" anything fine-tuned with hard labels alone. Each step resumes where it was stopped; finished ones are left
    untouched.

    Raises:
        RunError: If the network it starts from does not exist yet.
        ModelError: If a network cannot be pruned or quantized, or its file disagrees with it.
    """
    figures: dict[str, dict[str, Any]] = {}
    if config.prunes and "prune" in only:
        figures |= _prune(config, fine_tuning)
    if config.quantizes and "quantize" in only:
        figures |= _quantize(config, fine_tuning)
    return figures


def fine_tunings(config: CompressConfig) -> dict[str, tuple[TrainConfig, bool]]:
    """Return the training of each network that `compress` makes of a seed, and whether it is distilled, in order."""
    prune, train, scheme = config.prune, config.quantize_train, config.quantize.scheme
    gradual = replace(config.prune_train, epochs=config.prune_train.epochs + (prune.steps - 1) * prune.epochs_per_step)
    both = {"": True, **({"-alone": False} if config.baselines else {})}
    made = {f"pruned{ending}": (gradual, distilled) for ending, distilled in both.items() if config.prunes}
    if config.quantizes:
        made |= dict.fromkeys(config.grids, (train, True))
    if config.quantizes and config.baselines:
        made[f"{scheme}-ptq"] = replace(train, epochs=0), False
        if config.prunes:
            made |= {f"{scheme}-unpruned{ending}": (train, distilled) for ending, distilled in both.items()}
        made[f"{scheme}-alone"] = train, False
    return made


def student_source(config: CompressConfig, fine_tuning: FineTuneContext) -> TrainedModel:
    """Return the student to compress.

    Raises:
        RunError: If it is not trained yet.
        FingerprintMismatch: If another recipe trained it.
        ModelError: As `load_external`.
    """
    fresh = fine_tuning.build_student
    if config.student is None:
        folder, needed_by = fine_tuning.student_dir, "kdpipe train-student"
        stored = dict(finished_record(folder, needed_by)["architecture"])
        expected = json.loads(json.dumps(fresh().architecture))
        if found := differences(stored, expected, "architecture"):
            advice = f"Use the recipe that trained it, or {ANOTHER_RUN}."
            raise FingerprintMismatch(f"the student in {folder.path}", found, advice)
        return finished_source(folder, fresh, needed_by)
    path = Path(config.student).expanduser()
    network = fresh()
    class_names = fine_tuning.evaluation(network.normalize).class_names
    figures = measure_external(fine_tuning, load_external(path, network, class_names))
    return TrainedModel(figures["identity"], lambda: load_external(path, fresh(), class_names))


def student_job_dir(config: CompressConfig, fine_tuning: FineTuneContext) -> JobDir:
    """Return the folder with that student's figures and files."""
    if config.student is None:
        return fine_tuning.student_dir
    return JobDir(fine_tuning.root / "given")


def float_source(config: CompressConfig, fine_tuning: FineTuneContext, kind: str = "pruned") -> TrainedModel:
    """Return the float network of the chain: the pruned student, or the student if nothing is pruned.

    Raises:
        RunError: If it does not exist yet.
        FingerprintMismatch: If it was pruned with other settings than `config`.
    """
    if not config.prunes:
        return student_source(config, fine_tuning)
    folder = fine_tuning.job_dir(kind)
    found = finished_source(folder, fine_tuning.build_student, "kdpipe compress --only prune")
    if kind == "pruned":
        job = prune_fingerprint(
            _pruning(config, fine_tuning), config.prune_train, fine_tuning, student_source(config, fine_tuning)
        )
        folder.begin(job)
    return found


def float_job_dir(config: CompressConfig, fine_tuning: FineTuneContext) -> JobDir:
    """Return the folder of that float network."""
    return fine_tuning.job_dir("pruned") if config.prunes else student_job_dir(config, fine_tuning)


def is_done(config: CompressConfig, student: StudentConfig, run: Path) -> bool:
    """Return whether the chains of all seeds are finished, so that no dry run is needed."""
    root = compressed_root(run, config)
    jobs = [
        root / f"{kind}-seed{seed}"
        for kind in {**dict.fromkeys(config.kinds[1:]), **config.grids}
        for seed in student.seeds
    ]
    return all(JobDir(job).result() is not None for job in jobs)


def dry_run(
    config: CompressConfig,
    student: StudentConfig,
    losses: Sequence[Loss],
    context: StageContext,
    *,
    exports: bool = True,
) -> None:
    """Prune and prepare an untrained student, and export it unless `exports` is false, to fail before any training.

    `losses` are those of its training.

    Raises:
        ModelError: If the student cannot be compressed.
    """
    context = student.context(context)
    if config.prunes and config.prune.is_ranked:
        ranking_losses(EMBEDDING if student.is_headless else context.train_set.task, losses)
    network = build_student(student, student.seeds[0], context)
    if config.student is not None:
        class_names = () if student.is_headless else context.test_set.class_names
        network = load_external(Path(config.student).expanduser(), network, class_names)
    model, example = network.model, torch.zeros(2, *context.image_shape)
    if config.prunes:
        gradients = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
        pruning = config.prune
        if pruning.budget == "latency":  # measuring would take too long here
            pruning = replace(pruning, budget="parameters", ratio=0.1)
        untrained = Ranker(lambda network: 0.0)  # of equal harm, the first blocks go
        for part in pruning.parts:
            model = prune(model, example, part, full=network.model, gradients=gradients, ranker=untrained).model
        try_batches(replace(network, model=model), config.prune_train, role="pruned student", device=example.device)
    for library in {"openvino", "executorch"} & set(config.targets):
        require_library(library, f"compress.target = {library!r}")
    if config.quantizes:
        unquantized = model
        model = prepare(model, context.image_shape, config.quantize, config.grid)
        if isinstance(model, OnnxQuantized):
            if "executorch" in config.targets:
                raise ModelError(
                    "compress.target = 'executorch' needs a network that torch quantizes, not onnxruntime "
                    f"({model.reason or 'which compress.quantize.quantizer chooses'}): choose another target."
                )
            calibrate_onnx(
                model,
                unquantized,
                [example + 1],
                image_shape=context.image_shape,
                exclude=config.quantize.exclude,
                grid=config.grid,
            )
        else:
            if config.quantize.scheme != "int4":
                calibrate(model, [example + 1])
            try_batches(
                replace(network, model=model), config.quantize_train, role="quantized student", device=example.device
            )
    if exports and (config.steps or config.opset is not None or "executorch" in config.targets):
        try_export(model, context.image_shape, opset=config.opset, executorch="executorch" in config.targets)


def _prune(config: CompressConfig, fine_tuning: FineTuneContext) -> dict[str, dict[str, Any]]:
    source, pruning = student_source(config, fine_tuning), _pruning(config, fine_tuning)
    figures = {"pruned": prune_student(pruning, config.prune_train, fine_tuning, source, "pruned")}
    if config.baselines:
        is_searched = len(pruning.parts) == 1 and pruning.budget not in {"channels", "blocks"}
        ratio = figures["pruned"]["channel_ratio"] if is_searched else None
        alone = fine_tuning.baseline
        figures["pruned-alone"] = prune_student(pruning, config.prune_train, alone, source, "pruned-alone", ratio=ratio)
    return figures


def _pruning(config: CompressConfig, fine_tuning: FineTuneContext) -> PruneConfig:
    """Return the recipe's pruning, excluding the channels that the reused classifier (SimKD) reads."""
    losses = fine_tuning.spec.losses if fine_tuning.spec else ()
    reused = [projector_output_path(loss) for loss in losses if isinstance(loss, SimKD)]
    return replace(config.prune, exclude=(*config.prune.exclude, *reused))


def _quantize(config: CompressConfig, fine_tuning: FineTuneContext) -> dict[str, dict[str, Any]]:
    scheme, train = config.quantize.scheme, config.quantize_train
    alone = fine_tuning.baseline

    def quantized(kind: str, of: FineTuneContext, source: TrainedModel, train: TrainConfig = train) -> dict[str, Any]:
        sparse = config.prunes and config.prune.zeroes_weights and kind in (*config.grids, f"{scheme}-alone")
        name, grid = network_name(kind, prunes=config.prunes), config.grids.get(kind, config.grid)
        return quantize_student(config.quantize, train, of, source, kind, name=name, sparse=sparse, grid=grid)

    last = float_source(config, fine_tuning)
    figures: dict[str, dict[str, Any]] = {kind: quantized(kind, fine_tuning, last) for kind in config.grids}
    if config.baselines:
        unpruned = student_source(config, fine_tuning)
        figures[f"{scheme}-ptq"] = quantized(f"{scheme}-ptq", alone, unpruned, replace(train, epochs=0))
        if config.prunes:
            figures[f"{scheme}-unpruned"] = quantized(f"{scheme}-unpruned", fine_tuning, unpruned)
            figures[f"{scheme}-unpruned-alone"] = quantized(f"{scheme}-unpruned-alone", alone, unpruned)
        source = float_source(config, fine_tuning, "pruned-alone")
        figures[f"{scheme}-alone"] = quantized(f"{scheme}-alone", alone, source)
    return figures


def student_sensitivity(
    config: CompressConfig, fine_tuning: FineTuneContext, num_batches: int
) -> list[LayerSensitivity]:
    """Return the layers of the float student (pruned if the recipe prunes), the worst first.

    Raises:
        RunError: If that student does not exist yet.
    """
    network = float_source(config, fine_tuning).load()
    batches = fine_tuning.task(network).stream(
        fine_tuning.seed, config.quantize_train.batch_size, epoch=0, step=0, epochs=1
    )
    images = [batch.images.cpu() for batch in islice(batches, num_batches)]
    counter = fine_tuning.monitor.counter("sensitivity", "layer by layer", "layer")
    example = torch.zeros(2, *fine_tuning.evaluation(network.normalize).image_shape)
    return sensitivity(
        network.model.cpu(),
        example,
        images,
        exclude=config.quantize.exclude,
        grid=config.grid,
        task=fine_tuning.evaluation(network.normalize).task,
        on_progress=counter,
    )
