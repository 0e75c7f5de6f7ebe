"""The tables of `kdpipe report` about compressed students: what their files take, and what distillation won back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.terminal.output import printable
from stages.job_folder import read_json
from stages.latency_record import Latencies

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.report.pareto import Point
    from pipeline.report.report import Report, Row


@dataclass(frozen=True)
class WonBack:
    """What a compression cost in points of accuracy, against the student: fine-tuned with hard labels alone, and with
    the teacher's stores; and which share of the loss the stores won back, None where less than LEAST_LOSS was lost.
    """

    name: str
    points_lost_alone: float
    points_lost: float
    share: float | None


LEAST_LOSS = 0.1
"""Points of accuracy below which nothing worth winning back was lost."""

PAIRS = tuple((kind, f"{kind}-alone") for kind in ("pruned", "int8-unpruned", "int8", "int4-unpruned", "int4"))
"""Compressed with the stores, and the same with hard labels alone."""


def won_back(rows: Sequence[Row]) -> list[WonBack]:
    """What each compression lost and distillation won back, of those of which both were made."""
    known: dict[str, Row] = {row.kind: row for row in rows}
    student = known.get("student")
    found = []
    for with_stores, alone in PAIRS:
        if student is None or with_stores not in known or alone not in known:
            continue
        row = known[with_stores]
        if row.num_seeds != known[alone].num_seeds:  # under way: other seeds are no comparison
            continue
        lost_alone = student.accuracy_mean - known[alone].accuracy_mean
        lost = student.accuracy_mean - row.accuracy_mean
        found.append(WonBack(row.name, lost_alone, lost, 1 - lost / lost_alone if lost_alone >= LEAST_LOSS else None))
    return found


def print_costs(console: Console, latency: Latencies | None, rows: Sequence[Row]) -> None:
    """What each file takes: of a batch the median and the 95th percentile. What shares a file is shown once."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = "What they take"
    if latency is not None:
        threads = "one thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
        title += f": onnxruntime on {threads} of {escape(printable(latency.cpu))}, ms, median (95th percentile)"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in ("MACs", "of the teacher's size", "of the student's"):
        table.add_column(header, justify="right")
    for size in latency.batch_sizes if latency else ():
        table.add_column(f"batch of {size}", justify="right")
    for row in rows:
        if row.kind != row.timed_as and not (latency and row.kind in latency.files):
            continue
        times = [row.latency_ms[str(size)] for size in latency.batch_sizes] if latency and row.latency_ms else []
        table.add_row(
            row.name,
            "-" if row.num_macs is None else f"{row.num_macs:,}",
            fraction(row.of_teacher),
            fraction(row.of_student),
            *(f"{one['p50_ms']:.3f} ({one['p95_ms']:.3f})" for one in times),
        )
    console.print(table)


def fraction(times: float | None) -> str:
    """A file's size as a share of another's: 1/12.3, or how many times as large."""
    return "-" if times is None else f"1/{times:.1f}" if times >= 1 else f"{1 / times:.1f}"


def print_won_back(console: Console, found: Sequence[WonBack]) -> None:
    """What distillation won back; nothing where nothing was compared."""
    from rich import box
    from rich.table import Table

    if not found:
        return
    table = Table(box=box.SIMPLE, title="What compression cost, in points of accuracy", title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in ("fine-tuned with hard labels", "with the teacher's stores", "won back"):
        table.add_column(header, justify="right")
    for one in found:
        share = "-" if one.share is None else f"{100 * one.share:.0f} %"
        table.add_row(one.name, f"{one.points_lost_alone:+.2f}", f"{one.points_lost:+.2f}", share)
    console.print(table)


def num_bytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1024:.1f} KiB"


def draw_trade(run: Path) -> None:
    """Draw accuracy against size and latency into the folder of the compressed students, where there are any."""
    from pipeline.report.networks import compressed_folder
    from pipeline.report.pareto import draw_pareto
    from pipeline.report.report import read_report

    report, recipe = read_report(run), read_json(run / "recipe.json") or {}
    root = compressed_folder(recipe, run)
    if report.latency is None or not root.is_dir():
        return
    draw_pareto(trade_points(report), root / "pareto.svg", title=trade_title(report))


def trade_points(report: Report) -> list[Point]:
    """The networks that have a file, without those that only show what the teacher's words are worth."""
    from pipeline.report.pareto import Point

    largest = str(report.latency.batch_sizes[-1]) if report.latency else ""
    return [
        Point(row.name, row.accuracy_mean, row.accuracy_std, row.file_bytes, _median(row.latency_ms, largest))
        for row in report.rows
        if row.file_bytes is not None and "hard labels" not in row.name
    ]


def trade_title(report: Report) -> str:
    if report.latency is None:
        return f"{report.recipe}: accuracy and size"
    return f"{report.recipe}: accuracy, size and latency (batch of {report.latency.batch_sizes[-1]})"


def _median(times: Mapping[str, Any] | None, size: str) -> float | None:
    return None if times is None else float(times[size]["p50_ms"])
