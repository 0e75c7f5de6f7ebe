"""The table of a run: what each network gets right, weighs and takes, read from the figures that its jobs left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.command import printable
from pipeline.report.compressed import (
    WonBack,
    num_bytes,
    print_costs,
    print_won_back,
    won_back,
)
from pipeline.report.examined import Learnt, print_learnt, read_learnt, with_spread
from pipeline.report.networks import Place, compressed_folder, places_of
from stages.errors import RunError
from stages.job_folder import JobFolder, read_json
from stages.latency_record import Latencies, latency_path, read_latencies

MOST_LETTERS = 200
"""Of a name: no recipe has more."""


@dataclass(frozen=True)
class Row(Learnt):
    """One network of a run: figures over its seeds; None where it is not measured.

    Accuracies are percent of the test set at the last epoch (and at the best one); onnx_agreement is the least share,
    in percent, of test images on which the ONNX file gave torch's answer. latency_ms: median and 95th percentile of a
    batch, by its size, of the kind of network whose file takes the same time. of_teacher, of_student: how many times
    smaller the ONNX file is than theirs.
    """

    name: str
    kind: str
    timed_as: str
    num_seeds: int
    accuracy_mean: float
    accuracy_std: float | None
    best_accuracy_mean: float
    num_parameters: int
    num_macs: int | None
    file_bytes: int | None
    of_teacher: float | None
    of_student: float | None
    onnx_agreement: float | None
    latency_ms: dict[str, dict[str, float]] | None
    files: list[str]


@dataclass(frozen=True)
class Report:
    """A run's tables, and what is still to be done."""

    run: str
    recipe: str
    latency: Latencies | None
    rows: list[Row]
    won_back: list[WonBack]
    picture: str | None
    artifacts: list[str]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
        places, name, seeds = places_of(recipe, run), _name(recipe), recipe["student"]["seeds"]
        root = compressed_folder(recipe, run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{run / 'recipe.json'} is no recipe of a kdpipe run ({error!r}).") from error
    latency = read_latencies(latency_path(root, seeds[0]))
    rows: list[Row] = []
    missing = []
    for place in places:
        results = {job: result for job in place.jobs if (result := JobFolder(job).result()) is not None}
        num_missing = len(place.jobs) - len(results)
        missing += [f"{place.name} ({num_missing} of {len(place.jobs)})"] if num_missing else []
        rows += [_row(place, results, rows, latency)] if results else []
    artifacts = [str(path.parent) for seed in seeds for path in root.glob(f"artifacts-seed{seed}/card.json")]
    picture = str(root / "pareto.svg") if (root / "pareto.svg").exists() else None
    return Report(str(run), name, latency, rows, won_back(rows), picture, artifacts, missing)


def _name(recipe: Mapping[str, Any]) -> str:
    """The name, as it may be shown: the recipe may be a stranger's."""
    if not isinstance(recipe["name"], str):
        raise TypeError("its name is no text")
    return printable(recipe["name"][:MOST_LETTERS])


def _row(
    place: Place, results: Mapping[Path, Mapping[str, Any]], before: Sequence[Row], latency: Latencies | None
) -> Row:
    accuracies = [100 * result["accuracy"] for result in results.values()]
    first = next(iter(results.values()))
    agreements = [result["onnx_agreement"] for result in results.values() if result["onnx_agreement"] is not None]
    # A network that differs from another only in how it was fine-tuned has no file of its own: size and time are those.
    twin = next((row for row in before if row.kind == place.timed_as), None)
    file_bytes = first["onnx_bytes"] or (twin.file_bytes if twin else None)
    sizes = {row.kind: row.file_bytes for row in before} | {place.kind: file_bytes}
    return Row(
        name=place.name,
        kind=place.kind,
        timed_as=place.timed_as,
        num_seeds=len(results),
        accuracy_mean=mean(accuracies),
        accuracy_std=stdev(accuracies) if len(accuracies) > 1 else None,
        best_accuracy_mean=mean(100 * result["best_accuracy"] for result in results.values()),
        num_parameters=first["num_parameters"],
        num_macs=first.get("num_macs"),
        file_bytes=file_bytes,
        of_teacher=_times(sizes.get("teacher"), file_bytes),
        of_student=_times(sizes.get("student"), file_bytes),
        onnx_agreement=100 * min(agreements) if agreements else None,
        latency_ms=latency.of(place.kind, place.timed_as) if latency else None,
        files=[str(job / "model.onnx") for job in results if (job / "model.onnx").exists()],
        **vars(read_learnt(results)),
    )


def _times(larger: int | None, smaller: int | None) -> float | None:
    return larger / smaller if larger and smaller else None


def print_report(report: Report) -> None:
    """Write the tables to stdout, for people."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    table = Table(box=box.SIMPLE, title=f"{escape(report.recipe)}: what each network is worth", title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in ("test accuracy %", "seeds", "parameters", "ONNX file", "ONNX = torch %"):
        table.add_column(header, justify="right")
    for row in report.rows:
        table.add_row(
            row.name,
            with_spread(row.accuracy_mean, row.accuracy_std),
            str(row.num_seeds),
            f"{row.num_parameters:,}",
            num_bytes(row.file_bytes),
            "-" if row.onnx_agreement is None else f"{row.onnx_agreement:.2f}",
        )
    console.print(table)
    print_costs(console, report.latency, report.rows)
    print_learnt(console, report.rows)
    print_won_back(console, report.won_back)
    console.print("The files:", style="bold")
    for row in report.rows:
        if row.files:
            console.print(f"  {row.name:<18} {row.files[0]}", highlight=False, markup=False)
    if report.picture is not None:
        console.print(f"  picture            {report.picture}", highlight=False, markup=False)
    for folder in report.artifacts:
        console.print(f"  handed over        {folder}", highlight=False, markup=False)
    if (Path(report.run) / "compare").is_dir():
        console.print("Ways of teaching are compared here: run `kdpipe compare` again for their table.")
    if report.missing:
        console.print(f"Not done yet: {', '.join(report.missing)}: run the recipe again.")
