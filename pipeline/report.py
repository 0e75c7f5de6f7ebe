"""The table of a run: what each network gets right, weighs and takes, read from the figures that its jobs left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.report_examined import Learnt, print_learnt, read_learnt, with_spread
from stages.errors import RunError
from stages.job_folder import JobFolder, read_json


@dataclass(frozen=True)
class Row(Learnt):
    """One network of a run: figures over its seeds; None where it is not measured.

    Accuracies are percent of the test set at the last epoch (and at the best one); onnx_agreement is the least share,
    in percent, of test images on which the ONNX file gave torch's answer.
    """

    name: str
    num_seeds: int
    accuracy_mean: float
    accuracy_std: float | None
    best_accuracy_mean: float
    num_parameters: int
    file_bytes: int
    onnx_agreement: float
    latency_ms: float | None
    files: list[str]


@dataclass(frozen=True)
class Report:
    """A run's table, and what is still to be done."""

    run: str
    recipe: str
    latency_batch_size: int | None
    rows: list[Row]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


LATENCY_KEYS = {
    "teacher": "teacher",
    "student alone": "student",
    "student distilled": "student",
    "pruned": "pruned",
    "pruned + INT8": "int8",
    "INT8": "int8",
}
"""The entry of latency.json that belongs to a row."""


def read_report(run: Path) -> Report:
    """Collect the figures of the run folder `run`. Raises RunError if it is not one."""
    recipe = read_json(run / "recipe.json")
    if recipe is None:
        raise RunError(f"{run} is not a run folder: it has no recipe.json. Give the folder that `kdpipe run` names.")
    if (run / "generation1").is_dir():
        raise RunError(
            f"{run} holds generations: run `kdpipe generations` again for their table, or report on one of them, such "
            f"as {run / 'generation1'}."
        )
    try:
        name, seeds, steps = recipe["name"], list(recipe["student"]["seeds"]), list(recipe["compress"]["steps"])
    except (KeyError, TypeError) as error:
        raise RunError(f"{run / 'recipe.json'} is no recipe of a kdpipe run ({error!r}).") from error
    latency = read_json(run / "compressed" / "latency.json") or {}
    folders = {
        "teacher": [run / "teacher"],
        "student alone": [run / "students" / f"alone-seed{seed}" for seed in seeds],
        "student distilled": [run / "students" / f"distilled-seed{seed}" for seed in seeds],
    }
    if "prune" in steps:
        folders["pruned"] = [run / "compressed" / f"pruned-seed{seed}" for seed in seeds]
    if "quantize" in steps:
        folders["pruned + INT8" if "prune" in steps else "INT8"] = [
            run / "compressed" / f"int8-seed{seed}" for seed in seeds
        ]
    rows, missing = [], []
    for network, jobs in folders.items():
        num_missing = sum(JobFolder(job).result() is None for job in jobs)
        missing += [f"{network} ({num_missing} of {len(jobs)})"] if num_missing else []
        row = _row(network, jobs, latency.get("median_ms", {}))
        rows += [row] if row else []
    return Report(str(run), name, latency.get("batch_size"), rows, missing)


def _row(name: str, jobs: Sequence[Path], median_ms: dict[str, float]) -> Row | None:
    results = {job: result for job in jobs if (result := JobFolder(job).result()) is not None}
    if not results:
        return None
    accuracies = [100 * result["accuracy"] for result in results.values()]
    first = next(iter(results.values()))
    return Row(
        name=name,
        num_seeds=len(results),
        accuracy_mean=mean(accuracies),
        accuracy_std=stdev(accuracies) if len(accuracies) > 1 else None,
        best_accuracy_mean=mean(100 * result["best_accuracy"] for result in results.values()),
        num_parameters=first["num_parameters"],
        file_bytes=first["onnx_bytes"],
        onnx_agreement=min(100 * result["onnx_agreement"] for result in results.values()),
        latency_ms=_latency(name, median_ms),
        files=[str(job / "model.onnx") for job in results],
        **vars(read_learnt(results)),
    )


def _latency(name: str, median_ms: dict[str, float]) -> float | None:
    """Alone and distilled, a student is one network, unless a loss made it another."""
    if name == "student alone" and "alone" in median_ms:
        return median_ms["alone"]
    return median_ms.get(LATENCY_KEYS[name])


def print_report(report: Report) -> None:
    """Write the table to stdout, for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    batch = f", batch {report.latency_batch_size}" if report.latency_batch_size else ""
    table = Table(box=box.SIMPLE, title=f"{report.recipe}: what each network is worth", title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in ("test accuracy %", "seeds", "parameters", "ONNX file", "ONNX = torch %", f"latency ms{batch}"):
        table.add_column(header, justify="right")
    for row in report.rows:
        table.add_row(
            row.name,
            with_spread(row.accuracy_mean, row.accuracy_std),
            str(row.num_seeds),
            f"{row.num_parameters:,}",
            f"{row.file_bytes / 1024:.1f} KiB",
            f"{row.onnx_agreement:.2f}",
            "-" if row.latency_ms is None else f"{row.latency_ms:.3f}",
        )
    console.print(table)
    print_learnt(console, report.rows)
    console.print("The files:", style="bold")
    for row in report.rows:
        console.print(f"  {row.name:<18} {row.files[0]}", highlight=False)
    if (Path(report.run) / "compare").is_dir():
        console.print("Ways of teaching are compared here: run `kdpipe compare` again for their table.")
    if report.missing:
        console.print(f"Not done yet: {', '.join(report.missing)}: run the recipe again.")
