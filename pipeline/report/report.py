"""Read the results of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from kdpipe.pipeline.report.differences import Outcomes, between, differences_of, read_outcomes
from kdpipe.pipeline.report.networks import (
    MADE_IN_PYTHON,
    NetworkEntry,
    compressed_folder,
    network_entries,
    num_training_images,
)
from kdpipe.pipeline.report.rows import Report, Row, mean_and_std, read_quality, recovered_accuracy
from kdpipe.pipeline.report.variants import best_variants
from kdpipe.pipeline.report.verdict import Accuracy, Setting, Verdict, setting_of, verdict
from kdpipe.pipeline.terminal.output import printable
from kdpipe.stages.compress.artifacts.latency_record import Latencies, latency_path, read_latencies
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.intervals import Outcome, accuracy_interval
from kdpipe.stages.evaluation.main_metric import best_value, deciding, main_percent, metric_of
from kdpipe.stages.training.job_dir import JobDir, read_json_file

Result = Mapping[str, Any]
AllResults = Mapping[str, Mapping[Path, Result | None]]
"""The results of each kind of network, by job folder; None of a job that is not finished."""

MAX_NAME = 200
"""Letters of a recipe's name that are shown."""


def read_report(run: Path, compressed: Path | None = None) -> Report:
    """Collect the results of a run folder; `compressed` is a folder of compressed students with a recipe of its own.

    Raises:
        RunError: If `run` is not a run folder, or its results are damaged.
    """
    recipe = read_json_file(run / "recipe.json")
    if recipe is None:
        raise RunError(f"{run} is not a run folder: it has no recipe.json. Pass the folder that `kdpipe run` prints.")
    if (run / "generation1").is_dir():
        raise RunError(
            f"{run} holds generations: run `kdpipe generations` again for their table, or report on one of them, such "
            f"as {run / 'generation1'}."
        )
    if compressed is not None:
        recipe = {**recipe, "compress": (read_json_file(compressed / "recipe.json") or {}).get("compress")}
    try:
        entries, name, seeds = network_entries(recipe, run, compressed), _name(recipe), recipe["student"]["seeds"]
        root = compressed or compressed_folder(recipe, run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{run / 'recipe.json'} is not a recipe of a kdpipe run ({error!r}).") from error
    latency = read_latencies(latency_path(root, seeds[0]))
    rows: list[Row] = []
    missing: list[str] = []
    found: AllResults = {entry.kind: {job: JobDir(job).result() for job in entry.jobs} for entry in entries}
    outcomes = {kind: read_outcomes(results) for kind, results in found.items()}
    try:
        variants = best_variants(run)
    except RunError:  # the page's section of that table says so
        variants = ""
    in_part = bool(variants) or (run / MADE_IN_PYTHON).exists()  # networks that were never begun are not missing there
    for entry in entries:
        results = _finished(found[entry.kind])
        num_missing = len(entry.jobs) - len(results)
        if num_missing and (not in_part or any(job.exists() for job in entry.jobs)):
            missing.append(f"{entry.name} ({num_missing} of {len(entry.jobs)})")
        rows += [_row(entry, results, rows, outcomes[entry.kind], latency)] if results else []
    artifacts = [str(path.parent) for seed in seeds for path in root.glob(f"artifacts-seed{seed}/card.json")]
    return Report(
        run=str(run),
        recipe=name,
        verdict=_verdict(rows, outcomes, _setting(recipe, entries, found, rows), variants),
        latency=latency,
        rows=rows,
        differences=differences_of(outcomes),
        recovered=recovered_accuracy(rows, outcomes),
        pareto=str(root / "pareto.svg") if (root / "pareto.svg").exists() else None,
        artifacts=artifacts,
        missing=missing,
    )


def _finished(results: Mapping[Path, Result | None]) -> dict[Path, Result]:
    return {job: result for job, result in results.items() if result is not None}


def _setting(
    recipe: Mapping[str, Any], entries: Sequence[NetworkEntry], found: AllResults, rows: Sequence[Row]
) -> Setting:
    finished = {entry.kind: list(_finished(found[entry.kind]).values()) for entry in entries}
    at_chance = [entry.name for entry in entries if any(one.get("at_chance") for one in finished[entry.kind])]
    num_images = num_training_images(job for entry in entries for job in entry.jobs)
    setting = replace(setting_of(recipe, finished["student"]), at_chance=at_chance, num_images=num_images)
    return replace(setting, tested=rows[0].tested) if rows else setting


def _verdict(rows: Sequence[Row], outcomes: Outcomes, setting: Setting, variants: str) -> Verdict:
    """Return the verdict on the run's own students; where it has none, which variant of them is the best."""
    if variants and all(row.kind != "student" for row in rows):
        return Verdict("unknown", variants, None, [])
    accuracies = {row.kind: Accuracy(row.name, row.accuracy_mean, row.accuracy_std) for row in rows}
    gain, gap = (between(outcomes, kind, "alone") for kind in ("student", "teacher"))
    return verdict(accuracies, gain, gap, setting)


def _name(recipe: Mapping[str, Any]) -> str:
    """Return the recipe's name, safe to print: a recipe is untrusted input."""
    if not isinstance(recipe["name"], str):
        raise TypeError("name is not a string")
    return printable(recipe["name"][:MAX_NAME])


def _shown_name(entry: NetworkEntry, result: Mapping[str, Any]) -> str:
    """Return a network's name, with the quantizer where that is not torch's."""
    if result.get("quantizer") != "onnxruntime":
        return entry.name
    return f"{entry.name.removesuffix(', calibrated')}, calibrated by onnxruntime"


def _row(
    entry: NetworkEntry,
    results: Mapping[Path, Mapping[str, Any]],
    before: Sequence[Row],
    outcomes: Sequence[Outcome | None],
    latency: Latencies | None,
) -> Row:
    accuracy_mean, accuracy_std = mean_and_std([main_percent(result) for result in results.values()])
    first = next(iter(results.values()))
    interval = accuracy_interval([one for one in outcomes if one is not None])
    agreements = [result["onnx_agreement"] for result in results.values() if result["onnx_agreement"] is not None]
    # A network that differs only in how it was fine-tuned has no file of its own: it has the size of its twin.
    twin = next((row for row in before if row.kind == entry.timed_as), None)
    file_bytes = first["onnx_bytes"] or (twin.file_bytes if twin else None)
    sizes = {row.kind: row.file_bytes for row in before} | {entry.kind: file_bytes}
    without_file = [4 * row.num_parameters for row in before if row.kind == "teacher"]  # as float32
    return Row(
        name=_shown_name(entry, first),
        kind=entry.kind,
        timed_as=entry.timed_as,
        num_seeds=len(results),
        metric=metric_of(first).name,
        accuracy_mean=accuracy_mean or 0.0,
        accuracy_std=accuracy_std,
        interval=interval.in_percent if interval else None,
        best_accuracy_mean=mean(100 * best_value(result) for result in results.values()),
        validation_mean=mean_and_std([main_percent(deciding(result)) for result in results.values()])[0]
        if "validation" in first
        else None,
        num_parameters=first["num_parameters"],
        num_macs=first.get("num_macs"),
        file_bytes=file_bytes,
        of_teacher=_ratio(sizes.get("teacher") or next(iter(without_file), None), file_bytes),
        of_student=_ratio(sizes.get("student"), file_bytes),
        onnx_agreement=100 * min(agreements) if agreements else None,
        latency_ms=latency.of(entry.kind, entry.timed_as) if latency else None,
        files=[str(job / "model.onnx") for job in results if (job / "model.onnx").exists()],
        **vars(read_quality(results)),
    )


def _ratio(larger: int | None, smaller: int | None) -> float | None:
    return larger / smaller if larger and smaller else None
