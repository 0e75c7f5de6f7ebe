"""The last part of `kdpipe compress`: how fast the files are, and the folder that is handed over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.artefacts import Made, artefact_folder, write_artefacts
from stages.compress import CompressConfig, compressed_root, float_job, float_source, student_job
from stages.compression.latency import measure_latency
from stages.compression.onnx_graph import float_nodes
from stages.fine_tune import Tutor
from stages.given_student import narrow_types
from stages.job_folder import JobFolder, read_json, write_json
from stages.latency_record import Latencies, latency_path, read_latencies
from stages.machine.cores import cpu_name
from stages.network import Network
from stages.prune_student import Source, finished_source
from stages.quantize_student import prepare, quantize_job, quantized_record
from stages.setup import Setup
from stages.teaching import Teaching
from stages.train_student import ALONE, DISTILLED, StudentConfig, student_folder
from store import make_folders


def export_student(
    config: CompressConfig, student: StudentConfig, seed: int, teaching: Teaching, setup: Setup, *, name: str
) -> dict[str, Any]:
    """Measure the files of a seed's networks and write its artefacts, called `name`; returns the card. Raises RunError
    where the networks are not made yet, and what `write_artefacts` raises.
    """
    tutor = Tutor(student, seed, teaching, setup, compressed_root(setup.run, config))
    source = float_source(config, tutor)
    chain = [Made(float_job(config, tutor), source.load())]
    if config.quantizes:
        chain.append(Made(tutor.folder(config.quantize.scheme), _load_quantized(config, tutor, source)))
    latency = measure_files(config, tutor)
    return write_artefacts(
        artefact_folder(tutor.root, seed),
        chain,
        {"name": name, **_facts(config, tutor, latency)},
        setup,
        opset=config.opset,
        narrow=narrow_types(Path(config.student).expanduser()) if config.student and not config.steps else None,
    )


def measure_files(config: CompressConfig, tutor: Tutor) -> Latencies:
    """How long onnxruntime takes for a batch, teacher to INT8 student, in turn in one process: measured once for the
    same files, on the same number of threads. Raises RunError where the record of that is damaged.
    """
    setup, record = tutor.setup, latency_path(tutor.root, tutor.seed)
    present = {name: folder.onnx for name, folder in _timed(config, tutor).items() if folder.onnx.is_file()}
    measured_on: dict[str, Any] = {
        "batch_sizes": list(config.latency_batch_sizes),
        "num_rounds": config.latency_rounds,
        "num_threads": torch.get_num_threads(),
        "files_sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()},
    }
    kept, held = read_latencies(record), read_json(record) or {}
    if kept is not None and {key: held.get(key) for key in measured_on} == measured_on:
        return kept
    found = measure_latency(
        present,
        setup.image_shape,
        config.latency_batch_sizes,
        num_rounds=config.latency_rounds,
        num_threads=torch.get_num_threads(),
        between_rounds=setup.watch.check,
    )
    files = {name: {str(size): one.to_json() for size, one in by_size.items()} for name, by_size in found.items()}
    make_folders([record.parent])  # where nothing was compressed, nothing has made it yet
    write_json(record, measured_on | {"cpu": cpu_name(), "files": files})
    return Latencies(cpu_name(), measured_on["num_threads"], measured_on["batch_sizes"], files)


def _timed(config: CompressConfig, tutor: Tutor) -> dict[str, JobFolder]:
    """The networks whose files are timed. What only differs in how it was fine-tuned takes the same time."""
    run, seed, scheme = tutor.setup.run, tutor.seed, config.quantize.scheme
    alone, distilled = (student_folder(run, kind, seed) for kind in (ALONE, DISTILLED))
    sizes = [(folder.result() or {}).get("num_parameters") for folder in (alone, distilled)]
    folders = {"teacher": JobFolder(run / "teacher"), "student": student_job(config, tutor)}
    if config.student is None and sizes[0] != sizes[1]:  # SimKD's student has a projector
        folders["alone"] = alone
    if config.prunes:
        folders["pruned"] = tutor.folder("pruned")
    if config.quantizes:
        folders |= {kind: tutor.folder(kind) for kind in (scheme, f"{scheme}-unpruned")}
    return folders


def _load_quantized(config: CompressConfig, tutor: Tutor, source: Source) -> Network:
    """The finished quantized network."""

    def fresh() -> Network:
        network = source.load()
        prepared = prepare(network.model, tutor.setup.image_shape, config.quantize)
        architecture = {**network.architecture, **quantized_record(config.quantize)}
        return Network(prepared, architecture, network.normalise)

    folder = tutor.folder(config.quantize.scheme)
    if folder.result() is not None:  # made from this very network?
        folder.begin(quantize_job(config.quantize, config.quantize_train, tutor, source))
    return finished_source(folder, fresh, "kdpipe compress --only quantize").load()


def _facts(config: CompressConfig, tutor: Tutor, latency: Latencies) -> dict[str, Any]:
    """What the card says beside the files: where the student comes from, and the figures of all that led to it."""
    jobs = {"teacher": JobFolder(tutor.setup.run / "teacher"), "student": student_job(config, tutor)}
    if config.prunes:
        jobs["pruned"] = tutor.folder("pruned")
    if config.quantizes:
        jobs[config.quantize.scheme] = tutor.folder(config.quantize.scheme)
    results = {name: result for name, folder in jobs.items() if (result := folder.result()) is not None}
    last = jobs[list(jobs)[-1]]
    stores = tutor.teaching.stores if tutor.teaching else ()
    return {
        "kdpipe": version("kdpipe"),
        "seed": tutor.seed,
        "data": {"name": tutor.setup.test_set.name, "num_test_samples": tutor.setup.test_set.num_samples},
        "teachers": [
            {
                "model": store.manifest.identity.teacher["architecture"]["model"],
                "weights_sha256": store.manifest.identity.teacher["weights_sha256"],
                "fingerprint": store.manifest.identity.fingerprint,
                "num_views": store.num_views,
            }
            for store in stores
        ],
        "weights_sha256": results[list(results)[-1]]["identity"]["weights_sha256"],
        "networks": {name: _figures(result) for name, result in results.items()},
        "spared": results.get("pruned", {}).get("spared", {}),
        "float_nodes": [str(node) for node in float_nodes(last.onnx)] if config.quantizes else [],
        "latency": asdict(latency),
    }


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    examined = result.get("examined") or {}
    return {
        "accuracy": result["accuracy"],
        "agreement": examined.get("agreement"),
        "num_parameters": result["num_parameters"],
        "num_macs": result.get("num_macs"),
        "onnx_bytes": result["onnx_bytes"],
        "onnx_agreement": result["onnx_agreement"],
    }
