"""Plot accuracy against file size and latency for the networks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.report.networks import compressed_folder
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report
from kdpipe.stages.training.job_dir import read_json_file

if TYPE_CHECKING:
    from kdpipe.pipeline.report.pareto_svg import Point


def write_pareto_plot(run: Path) -> None:
    """Write pareto.svg into the folder of the compressed students, once latencies were measured."""
    report, recipe = read_report(run), read_json_file(run / "recipe.json") or {}
    root = compressed_folder(recipe, run)
    if report.latency is None or not root.is_dir():
        return
    from kdpipe.pipeline.report.pareto_svg import write_pareto

    write_pareto(tradeoff_points(report), root / "pareto.svg", title=tradeoff_title(report))


def tradeoff_points(report: Report) -> list[Point]:
    """Return the networks that have a file, without the hard-label baselines."""
    from kdpipe.pipeline.report.pareto_svg import Point

    largest = str(report.latency.batch_sizes[-1]) if report.latency else ""
    return [
        Point(row.name, row.accuracy_mean, row.accuracy_std, row.file_bytes, _median(row.latency_ms, largest))
        for row in report.rows
        if row.file_bytes is not None and "hard labels" not in row.name
    ]


def tradeoff_title(report: Report) -> str:
    if report.latency is None:
        return f"{report.recipe}: accuracy and size"
    return f"{report.recipe}: accuracy, size and latency (batch of {report.latency.batch_sizes[-1]})"


def _median(times: Mapping[str, Any] | None, size: str) -> float | None:
    return None if times is None else float(times[size]["p50_ms"])
