"""Finish `kdpipe compress`: measure the files' latency and write the artifacts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdpipe.stages.compress.artifacts.latency_record import Latencies, latency_path, read_latencies, timed_in
from kdpipe.stages.compress.artifacts.runtime_files import RuntimeFile, write_runtime_files
from kdpipe.stages.compress.artifacts.write import Candidate, artifact_folder, write_artifacts
from kdpipe.stages.compress.compress import CompressConfig, float_source, student_job_dir, student_source
from kdpipe.stages.compress.external_student import low_precision_dtypes
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.quantize_student import INT4_LAYERS, prepare, quantize_fingerprint, quantized_record
from kdpipe.stages.compress.resume import TrainedModel, finished_source
from kdpipe.stages.compress.targets import Target
from kdpipe.stages.compute.threads import max_threads
from kdpipe.stages.distillation.student_config import ALONE, student_folder
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.evaluation.intervals import accuracy_interval
from kdpipe.stages.evaluation.latency import WARM_UP_ROUNDS, measure_latency
from kdpipe.stages.evaluation.main_metric import main_value, metric_of
from kdpipe.stages.export.onnx_session import float_nodes
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.cpu import cpu_name
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.store import make_folders
from kdpipe.store.fs.checksums import file_sha256, require_intact


def export_student(config: CompressConfig, fine_tuning: FineTuneContext, *, name: str) -> dict[str, Any]:
    """Measure the files of a seed's networks, write its artifacts, called `name`, and return the card.

    Raises:
        RunError: If the networks do not exist yet.
        ModelError: As `write_artifacts`.
    """
    candidates = _candidates(config, fine_tuning)
    test = fine_tuning.evaluation(candidates[0].network.normalize)
    num_rounds = (WARM_UP_ROUNDS + config.latency_rounds) * len(config.latency_batch_sizes)
    written = {candidate.kind: write_runtime_files(config, fine_tuning, candidate, test) for candidate in candidates}
    steps, job = itertools.count(), export_name(fine_tuning.seed)

    def advance() -> None:
        fine_tuning.monitor.check()
        event = ProgressEvent("compress", job, next(steps), num_rounds + len(candidates), "step")
        fine_tuning.monitor.report(event)

    latency = measure_files(config, fine_tuning, written, advance)
    steps = itertools.count(num_rounds)
    facts = {"name": name, **_facts(fine_tuning, candidates, test, latency)}
    for kind, files in written.items():
        facts["networks"][kind] |= (
            {"runtimes": {target: file.figures for target, file in files.items()}} if files else {}
        )
    candidates = [_with_files(one, config.targets, written[one.kind]) for one in candidates]
    folder = artifact_folder(fine_tuning.root, fine_tuning.seed)
    card = write_artifacts(folder, candidates, facts, test, opset=config.opset, before_each=advance)
    advance()
    return card


def _with_files(candidate: Candidate, targets: Sequence[Target], files: Mapping[str, RuntimeFile]) -> Candidate:
    """Return a network with its files for other runtimes; its predict.py uses the first target that it can."""
    runtime = next((target for target in targets if target in (*files, "onnxruntime")), "onnxruntime")
    return replace(candidate, files=[part for file in files.values() for part in file.parts], runtime=runtime)


def export_name(seed: int) -> str:
    """Return the name of the last job of a seed in progress events."""
    return f"export, seed {seed}"


def _candidates(config: CompressConfig, fine_tuning: FineTuneContext) -> list[Candidate]:
    """Return the networks that are offered: all but calibrated ones and those of hard labels alone.

    The student itself is first, the end of the chain is last.
    """
    student, scheme = student_source(config, fine_tuning), config.quantize.scheme
    network = student.load()
    dtypes = low_precision_dtypes(Path(config.student).expanduser(), network.model) if config.student else {}
    found = [Candidate("student", student_job_dir(config, fine_tuning), network, dtypes)]
    if config.prunes:
        source = float_source(config, fine_tuning)
        found.append(Candidate("pruned", fine_tuning.job_dir("pruned"), source.load()))
        if config.quantizes and config.baselines:
            found.append(_quantized(config, fine_tuning, student, f"{scheme}-unpruned"))
    if config.quantizes:
        last = float_source(config, fine_tuning)
        found += [_quantized(config, fine_tuning, last, kind) for kind in config.grids]
    return found


def measure_files(
    config: CompressConfig,
    fine_tuning: FineTuneContext,
    written: Mapping[str, Mapping[str, RuntimeFile]],
    between_rounds: Callable[[], None],
) -> Latencies:
    """Measure the time per batch, teacher to INT8 student, each on its own size of images, in turn in one process.

    That is onnxruntime's, and that of the files `written` for other runtimes, named "KIND in TARGET".

    The result is recorded and reused for the same files and number of threads. Raises RunError if the record is
    damaged.
    """
    record = latency_path(fine_tuning.root, fine_tuning.seed)
    present = {
        name: folder.onnx for name, folder in _measured_folders(config, fine_tuning).items() if folder.onnx.is_file()
    }
    present |= {
        timed_in(kind, target): file.path
        for kind, files in written.items()
        for target, file in files.items()
        if file.is_timed
    }
    for path in present.values():
        require_intact(path)
    measured_on: dict[str, Any] = {
        "batch_sizes": list(config.latency_batch_sizes),
        "num_rounds": config.latency_rounds,
        "num_threads": max_threads(),
        "files_sha256": {name: file_sha256(path) for name, path in present.items()},
    }
    recorded, previous = read_latencies(record), read_json_file(record) or {}
    if recorded is not None and {key: previous.get(key) for key in measured_on} == measured_on:
        return recorded
    found = measure_latency(
        present,
        None,
        config.latency_batch_sizes,
        num_rounds=config.latency_rounds,
        num_threads=max_threads(),
        between_rounds=between_rounds,
    )
    files = {
        name: {str(size): latency.to_json() for size, latency in by_size.items()} for name, by_size in found.items()
    }
    make_folders([record.parent])  # absent if nothing was compressed
    write_json_file(record, measured_on | {"cpu": cpu_name(), "files": files})
    return Latencies(cpu_name(), measured_on["num_threads"], measured_on["batch_sizes"], files)


def _measured_folders(config: CompressConfig, fine_tuning: FineTuneContext) -> dict[str, JobDir]:
    """Return the networks to measure. Those that differ only in their fine-tuning take the same time."""
    run, seed, scheme = fine_tuning.run_dir, fine_tuning.seed, config.quantize.scheme
    alone, distilled = student_folder(run, ALONE, seed), fine_tuning.student_dir
    sizes = [(folder.result() or {}).get("num_parameters") for folder in (alone, distilled)]
    folders = {"teacher": JobDir(run / "teacher"), "student": student_job_dir(config, fine_tuning)}
    if config.student is None and sizes[0] != sizes[1]:  # SimKD's student has a projector
        folders["alone"] = alone
    if config.prunes:
        folders["pruned"] = fine_tuning.job_dir("pruned")
    if config.quantizes:
        kinds = {**config.grids, f"{scheme}-unpruned": config.grid}
        # onnxruntime computes the symmetric grid of TensorRT slowly: its time would say nothing about that.
        folders |= {kind: fine_tuning.job_dir(kind) for kind, grid in kinds.items() if grid == "affine"}
    return folders


def _quantized(config: CompressConfig, fine_tuning: FineTuneContext, source: TrainedModel, kind: str) -> Candidate:
    """Load a finished quantized network."""
    grid, folder = config.grids.get(kind, config.grid), fine_tuning.job_dir(kind)
    int4 = (folder.result() or {}).get(INT4_LAYERS)

    def fresh() -> ModelBundle:
        network = source.load()
        image_shape = fine_tuning.evaluation(network.normalize).image_shape
        prepared = prepare(network.model, image_shape, config.quantize, grid, int4)
        architecture = {**network.architecture, **quantized_record(config.quantize, prepared, grid, int4)}
        return ModelBundle(prepared, architecture, network.normalize)

    if folder.result() is not None:  # was it made from this network?
        folder.begin(quantize_fingerprint(config.quantize, config.quantize_train, fine_tuning, source, grid))
    network = finished_source(folder, fresh, "kdpipe compress --only quantize").load()
    return Candidate(kind, folder, network, is_ranked=kind not in list(config.grids)[1:])


def _facts(
    fine_tuning: FineTuneContext, candidates: Sequence[Candidate], test: Evaluation, latency: Latencies
) -> dict[str, Any]:
    """Return the cards' entries on origin and figures."""
    folders = {"teacher": JobDir(fine_tuning.run_dir / "teacher")} | {one.kind: one.folder for one in candidates}
    stores = fine_tuning.spec.stores if fine_tuning.spec else ()
    return {
        "kdpipe": version("kdpipe"),
        "seed": fine_tuning.seed,
        "data": {
            "name": test.loader.dataset.name,
            "num_test_samples": test.loader.dataset.num_samples,
        },
        "teachers": [
            {
                "model": store.manifest.identity.teacher["architecture"]["model"],
                "weights_sha256": store.manifest.identity.teacher["weights_sha256"],
                "fingerprint": store.manifest.identity.fingerprint,
                "num_views": store.num_views,
            }
            for store in stores
        ],
        "networks": {
            name: _figures(folder, result)
            for name, folder in folders.items()
            if (result := folder.result()) is not None
        },
        "latency": asdict(latency),
    }


def _figures(folder: JobDir, result: Mapping[str, Any]) -> dict[str, Any]:
    identity, examined = result["identity"], result.get("examined") or {}
    interval, metric, validated = accuracy_interval([outcome_of(result)]), metric_of(result), result.get("validation")
    return {
        **metric.record(main_value(result)),
        f"{metric.name}_interval": None if interval is None else [interval.low, interval.high],
        **({f"validation_{metric_of(validated).name}": main_value(validated)} if validated else {}),
        "agreement": examined.get("agreement"),
        "num_parameters": result["num_parameters"],
        "num_macs": result.get("num_macs"),
        "onnx_bytes": result["onnx_bytes"],
        "onnx_agreement": result["onnx_agreement"],
        "weights_sha256": identity["weights_sha256"],
        "excluded": result.get("excluded", {}),
        "float_nodes": [str(node) for node in float_nodes(folder.onnx)]
        if "quantized" in identity["architecture"]
        else [],
    }
