"""Read the results of a run and print them as tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kdpipe.pipeline.report.networks import MADE_IN_PYTHON, NetworkEntry, compressed_folder, network_entries
from kdpipe.pipeline.report.rows import Report, Row, mean_and_std, read_quality, recovered_accuracy
from kdpipe.pipeline.report.tables import report_tables
from kdpipe.pipeline.session.paths import require_writable
from kdpipe.pipeline.terminal.exit_codes import DONE, DONE_IN_PART
from kdpipe.pipeline.terminal.output import console, print_json, printable
from kdpipe.pipeline.terminal.tables import print_table
from kdpipe.stages.compress.artifacts.latency_record import Latencies, latency_path, read_latencies
from kdpipe.stages.errors import RunError
from kdpipe.stages.training.job_dir import JobDir, read_json_file

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
    in_python = (run / MADE_IN_PYTHON).exists()  # networks that were never begun are not missing there
    for entry in entries:
        results = {job: result for job in entry.jobs if (result := JobDir(job).result()) is not None}
        num_missing = len(entry.jobs) - len(results)
        if num_missing and (not in_python or any(job.exists() for job in entry.jobs)):
            missing.append(f"{entry.name} ({num_missing} of {len(entry.jobs)})")
        rows += [_row(entry, results, rows, latency)] if results else []
    artifacts = [str(path.parent) for seed in seeds for path in root.glob(f"artifacts-seed{seed}/card.json")]
    pareto = str(root / "pareto.svg") if (root / "pareto.svg").exists() else None
    return Report(str(run), name, latency, rows, recovered_accuracy(rows), pareto, artifacts, missing)


def _name(recipe: Mapping[str, Any]) -> str:
    """Return the recipe's name, safe to print: a recipe is untrusted input."""
    if not isinstance(recipe["name"], str):
        raise TypeError("name is not a string")
    return printable(recipe["name"][:MAX_NAME])


def _row(
    entry: NetworkEntry, results: Mapping[Path, Mapping[str, Any]], before: Sequence[Row], latency: Latencies | None
) -> Row:
    accuracy_mean, accuracy_std = mean_and_std([100 * result["accuracy"] for result in results.values()])
    first = next(iter(results.values()))
    agreements = [result["onnx_agreement"] for result in results.values() if result["onnx_agreement"] is not None]
    # A network that differs only in how it was fine-tuned has no file of its own: it has the size of its twin.
    twin = next((row for row in before if row.kind == entry.timed_as), None)
    file_bytes = first["onnx_bytes"] or (twin.file_bytes if twin else None)
    sizes = {row.kind: row.file_bytes for row in before} | {entry.kind: file_bytes}
    return Row(
        name=entry.name,
        kind=entry.kind,
        timed_as=entry.timed_as,
        num_seeds=len(results),
        accuracy_mean=accuracy_mean or 0.0,
        accuracy_std=accuracy_std,
        best_accuracy_mean=mean(100 * result["best_accuracy"] for result in results.values()),
        num_parameters=first["num_parameters"],
        num_macs=first.get("num_macs"),
        file_bytes=file_bytes,
        of_teacher=_ratio(sizes.get("teacher"), file_bytes),
        of_student=_ratio(sizes.get("student"), file_bytes),
        onnx_agreement=100 * min(agreements) if agreements else None,
        latency_ms=latency.of(entry.kind, entry.timed_as) if latency else None,
        files=[str(job / "model.onnx") for job in results if (job / "model.onnx").exists()],
        **vars(read_quality(results)),
    )


def _ratio(larger: int | None, smaller: int | None) -> float | None:
    return larger / smaller if larger and smaller else None


def print_reports(runs: Sequence[Path], as_json: bool, *, full: bool = False, page: Path | None = None) -> int:
    """Print the reports of runs and return the exit status: 3 if any of their jobs are unfinished.

    Args:
        runs: The run folders.
        as_json: Whether to print JSON, which has everything.
        full: Whether to print all tables.
        page: The HTML page that is written too.

    Raises:
        RunError: Before anything is printed, as `read_report` does.
    """
    from kdpipe.pipeline.report.html.read import read_run
    from kdpipe.pipeline.report.short import print_short

    if full or as_json:
        reports = [read_report(run) for run in runs]
    else:
        page_runs = [read_run(run, number) for number, run in enumerate(runs, 1)]
        reports = [run.report for run in page_runs]
    if as_json:
        documents = [report.to_json() for report in reports]
        print_json(documents[0] if len(documents) == 1 else {"reports": documents})
    elif full:
        for report in reports:
            print_report(report)
    else:
        for run in page_runs:
            print_short(run, page)
    return DONE_IN_PART if any(report.missing for report in reports) else DONE


def page_path(runs: Sequence[Path], file: Path | None) -> Path:
    """Return the page's path: `file`, or report.html in the only run's folder, or in the current one.

    A run folder that may only be read, such as a colleague's, has its page in the current folder, with its name.

    Raises:
        RunError: If no file can be written there.
    """
    path = file or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if file is None and path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        path = Path(f"report-{path.parent.resolve().name}.html")
    if file is not None or path.parent.is_dir():
        require_writable(path, "--html")
    return path


def print_report(report: Report) -> None:
    """Print all tables and the paths of the files to stdout."""
    screen = console()
    screen.print(report.recipe, style="bold")
    for table in report_tables(report):
        print_table(screen, table)
    screen.print("Files:", style="bold")
    files = [(row.name, row.files[0]) for row in report.rows if row.files]
    files += [("Pareto plot", report.pareto)] if report.pareto else []
    files += [("artifacts", folder) for folder in report.artifacts]
    for name, path in files:
        screen.print(f"  {name:<18} {path}", soft_wrap=True)
    if (Path(report.run) / "compare").is_dir():
        screen.print("This run compares distillation variants: run `kdpipe compare` again for their table.")
    if report.missing:
        screen.print(f"Not finished: {', '.join(report.missing)}. Run the recipe again to complete it.", soft_wrap=True)
