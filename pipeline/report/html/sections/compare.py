"""Several runs on one page: their results in one table, and their students' learning curves on the same axes."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.pipeline.report.formatting import integer, interval_text, kib, mean_std, share
from kdpipe.pipeline.report.html.read import MAIN_KINDS, PageRun
from kdpipe.pipeline.report.html.sections.curves import curve_panel, curves_of, legend
from kdpipe.pipeline.report.html.templating import link
from kdpipe.pipeline.terminal.tables import Table

HEADERS = (
    "run",
    "folder",
    "teacher %",
    "student alone %",
    "student distilled %",
    "points gained",
    "95 % interval",
    "gap closed",
    "parameters",
    "ONNX file",
)


def comparison(runs: Sequence[PageRun]) -> dict[str, object]:
    curves = {run.key: curves_of(network for network in run.main if network.kind != "teacher") for run in runs}
    together = [curve for of_run in curves.values() for curve in of_run]
    charts = [
        curve_panel(f"{run.report.recipe} ({run.folder_name})", curves[run.key], together)
        for run in runs
        if curves[run.key]
    ]
    table = Table("Comparison of runs", HEADERS, [_row(run) for run in runs], num_names=2)
    return {"runs": table, "charts": charts, "legend": legend(together)}


def _row(run: PageRun) -> list[object]:
    gain, student = run.report.difference("student", "alone"), run.row("student")
    rows = [run.row(kind) for kind in MAIN_KINDS]
    return [
        link(f"{run.key}top", run.report.recipe),
        run.folder_name,
        *(mean_std(row.accuracy_mean, row.accuracy_std) if row else "-" for row in rows),
        mean_std(gain.points, signed=True) if gain else "-",
        interval_text(gain.interval, signed=True) if gain else "-",
        share(run.report.verdict.share_closed),
        integer(student.num_parameters if student else None),
        kib(student.file_bytes if student else None),
    ]
