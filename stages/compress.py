"""Stage 3, `kdpipe compress`: prune the distilled student, take it to integers, teach it from the stores all the while,
and hand over what came of it, beside what it is to be compared with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from stages.compression.onnx_file import export_onnx
from stages.compression.prune import PruneConfig, prune
from stages.compression.quantize import calibrate
from stages.config import Place, section, unequal
from stages.fine_tune import Tutor
from stages.given_student import load_given, measure_given
from stages.job_folder import JobFolder
from stages.losses.simkd import SimKDConfig
from stages.machine.cores import step_back
from stages.model_file import finished_record
from stages.network import Network
from stages.optim import TrainConfig
from stages.prune_student import Source, finished_source, prune_job, prune_student
from stages.quantize_student import QuantizeConfig, calibrated_only, prepare, quantize_student
from stages.reuse_classifier import last_of_projector
from stages.setup import Setup
from stages.teaching import Teaching
from stages.train_student import DISTILLED, StudentConfig, fresh_student, student_folder
from store import FingerprintMismatch, differences

Step = Literal["prune", "quantize", "export"]
STEPS: tuple[Step, ...] = ("prune", "quantize", "export")
"""What `kdpipe compress` does, in order."""


@section
class CompressConfig:
    """How the distilled students are made small: pruned, then quantized, each with its own fine-tuning, and exported.

    steps: which of the two are done, always in this order; without either a student is handed on untouched.
    baselines: whether that is made, too, with which the result is compared: the student quantized as it is, calibrated
        only, and every fine-tuning once more with hard labels alone.
    student: a file with the weights of a student that was trained elsewhere, in the place of the distilled ones.
    opset: of the ONNX files that are handed over; by default the exporter's own.
    latency_batch_sizes: images in the batches whose latency is reported.
    nice: by how much this stage, which is a CPU's work for long, steps back behind others on the machine.
    """

    steps: tuple[Literal["prune", "quantize"], ...] = ("prune", "quantize")
    baselines: bool = True
    student: Place | None = None
    prune: PruneConfig = Field(default_factory=PruneConfig)
    prune_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=10, lr=0.01))
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    quantize_train: TrainConfig = Field(default_factory=lambda: TrainConfig(epochs=5, lr=0.001))
    opset: Annotated[int, Field(ge=1, le=1000)] | None = None
    latency_batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1), AfterValidator(unequal)
    ] = (1, 64)
    latency_rounds: Annotated[int, Field(ge=3, le=10**6)] = 50
    nice: Annotated[int, Field(ge=0, le=19)] = 10

    @property
    def prunes(self) -> bool:
        return "prune" in self.steps

    @property
    def quantizes(self) -> bool:
        return "quantize" in self.steps


def compressed_root(run: Path, config: CompressConfig) -> Path:
    """Where a run's compressed students are: those of a given one in a folder that bears its file's name."""
    return run / ("compressed" if config.student is None else f"compressed-{Path(config.student).stem}")


def compress(
    config: CompressConfig,
    student: StudentConfig,
    seed: int,
    teaching: Teaching,
    setup: Setup,
    *,
    only: Sequence[Step] = STEPS,
) -> dict[str, dict[str, Any]]:
    """Prune and quantize the student of a seed, as `config.steps` says; returns the figures of each network made.

    `pruned` and `int8` (or `int4`) are the chain itself; of its baselines "-unpruned" is the student quantized as it
    is, "-ptq" the same only calibrated, and "-alone" anything fine-tuned with hard labels alone.
    Each step resumes where it was stopped, and a finished one is not touched. This process steps back behind others by
    `config.nice`, for good. Raises RunError where what it starts from is not there yet, ModelError where a network
    cannot be pruned or quantized, or its file does not agree with it.
    """
    step_back(config.nice)
    taught = Tutor(student, seed, teaching, setup, compressed_root(setup.run, config))
    figures: dict[str, dict[str, Any]] = {}
    if config.prunes and "prune" in only:
        figures |= _prune(config, taught)
    if config.quantizes and "quantize" in only:
        figures |= _quantize(config, taught)
    return figures


def student_source(config: CompressConfig, tutor: Tutor) -> Source:
    """The student that is compressed. Raises RunError where it is not trained yet, and what `load_given` raises."""
    fresh = _fresh(tutor)
    if config.student is None:
        folder, needed_by = student_folder(tutor.setup.run, DISTILLED, tutor.seed), "kdpipe train-student"
        stored = dict(finished_record(folder, needed_by)["architecture"])
        stored.pop("reused_classifier", None)
        wanted = json.loads(json.dumps(tutor.setup.architecture(tutor.student.model)))
        if found := differences(stored, wanted, "architecture"):
            advice = "Use the recipe that trained it, or another run folder (--run)."
            raise FingerprintMismatch(f"the student in {folder.path}", found, advice)
        return finished_source(folder, fresh, needed_by)
    path = Path(config.student).expanduser()
    class_names = tutor.setup.test_set.class_names
    figures = measure_given(tutor, load_given(path, fresh(), class_names))
    return Source(figures["identity"], lambda: load_given(path, fresh(), class_names))


def student_job(config: CompressConfig, tutor: Tutor) -> JobFolder:
    """The folder with that student's figures and files."""
    if config.student is None:
        return student_folder(tutor.setup.run, DISTILLED, tutor.seed)
    return JobFolder(tutor.root / "given")


def float_source(config: CompressConfig, tutor: Tutor, kind: str = "pruned") -> Source:
    """The float network of the chain: the pruned student, or the student where nothing is pruned. Raises RunError where
    it is not there yet, FingerprintMismatch where it was pruned otherwise than `config` says.
    """
    if not config.prunes:
        return student_source(config, tutor)
    folder = tutor.folder(kind)
    found = finished_source(folder, _fresh(tutor), "kdpipe compress --only prune")
    if kind == "pruned":
        job = prune_job(_pruning(config, tutor), config.prune_train, tutor, student_source(config, tutor))
        folder.begin(job)
    return found


def float_job(config: CompressConfig, tutor: Tutor) -> JobFolder:
    """The folder of that float network."""
    return tutor.folder("pruned") if config.prunes else student_job(config, tutor)


def is_done(config: CompressConfig, student: StudentConfig, run: Path) -> bool:
    """Whether the chains of all seeds are finished: then nothing needs to be tried before."""
    root = compressed_root(run, config)
    kinds = ["pruned"] * config.prunes + [config.quantize.scheme] * config.quantizes
    return all(JobFolder(root / f"{kind}-seed{seed}").result() is not None for kind in kinds for seed in student.seeds)


def rehearse(config: CompressConfig, student: StudentConfig, setup: Setup) -> None:
    """Prune and prepare an untrained student, and export it where an opset is asked for: what cannot be compressed is
    refused before anything is trained.
    """
    network = fresh_student(student, student.seeds[0], setup)
    if config.student is not None:
        network = load_given(Path(config.student).expanduser(), network, setup.test_set.class_names)
    model, example = network.model, torch.zeros(2, *setup.image_shape)
    if config.prunes:
        gradients = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
        tried = config.prune
        if tried.of == "latency":  # there is no time to measure it now
            tried = replace(tried, of="parameters", ratio=0.1)
        model = prune(model, example, tried, gradients=gradients).model
    if config.quantizes:
        model = prepare(model, setup.image_shape, config.quantize)
        if config.quantize.scheme == "int8":
            calibrate(model, [example + 1])
    if config.opset is not None:
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, example, Path(folder) / "model.onnx", metadata={}, opset=config.opset)


def _prune(config: CompressConfig, taught: Tutor) -> dict[str, dict[str, Any]]:
    source, pruning = student_source(config, taught), _pruning(config, taught)
    figures = {"pruned": prune_student(pruning, config.prune_train, taught, source, "pruned")}
    if config.baselines:
        ratio = None if pruning.of == "channels" else figures["pruned"]["channel_ratio"]
        alone = replace(taught, teaching=None)
        figures["pruned-alone"] = prune_student(pruning, config.prune_train, alone, source, "pruned-alone", ratio=ratio)
    return figures


def _pruning(config: CompressConfig, taught: Tutor) -> PruneConfig:
    """The recipe's pruning; what the teacher's own classifier sees (SimKD) keeps its channels."""
    losses = taught.teaching.losses if taught.teaching else ()
    reused = [last_of_projector(loss) for loss in losses if isinstance(loss, SimKDConfig)]
    return replace(config.prune, keep=(*config.prune.keep, *reused))


def _quantize(config: CompressConfig, taught: Tutor) -> dict[str, dict[str, Any]]:
    scheme, train = config.quantize.scheme, config.quantize_train
    alone = replace(taught, teaching=None)

    def quantized(kind: str, tutor: Tutor, source: Source, train: TrainConfig = train) -> dict[str, Any]:
        sparse = config.prunes and config.prune.kind != "channels" and kind in (scheme, f"{scheme}-alone")
        return quantize_student(config.quantize, train, tutor, source, kind, sparse=sparse)

    figures: dict[str, dict[str, Any]] = {scheme: quantized(scheme, taught, float_source(config, taught))}
    if config.baselines:
        unpruned = student_source(config, taught)
        figures[f"{scheme}-ptq"] = quantized(f"{scheme}-ptq", alone, unpruned, calibrated_only(train))
        if config.prunes:
            figures[f"{scheme}-unpruned"] = quantized(f"{scheme}-unpruned", taught, unpruned)
            figures[f"{scheme}-unpruned-alone"] = quantized(f"{scheme}-unpruned-alone", alone, unpruned)
        source = float_source(config, taught, "pruned-alone")
        figures[f"{scheme}-alone"] = quantized(f"{scheme}-alone", alone, source)
    return figures


def _fresh(tutor: Tutor) -> Callable[[], Network]:
    """Builds the untrained student, with what losses make part of it."""
    losses = tutor.teaching.losses if tutor.teaching else ()
    return lambda: fresh_student(tutor.student, tutor.seed, tutor.setup, losses)
