"""Sections of the report's tables, and of accuracy against size and latency."""

from __future__ import annotations

from statistics import median

from kdpipe.pipeline.report.formatting import mean_std
from kdpipe.pipeline.report.html.read import MAIN_KINDS, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.pareto import CAPTION, pareto_panels, tradeoff_points, tradeoff_title
from kdpipe.pipeline.report.tables import report_tables
from kdpipe.pipeline.report.variants import recorded_tables
from kdpipe.pipeline.terminal.tables import Table

MAX_CLASSES = 1000
"""Classes whose accuracy is listed; `kdpipe report --json` has all."""


def results(run: PageRun) -> dict[str, object]:
    return {
        "tables": list(report_tables(run.report)),
        "classes": _classes(run),
        "missing": run.report.missing,
    }


def has_variants(run: PageRun) -> bool:
    return any((run.path / command).is_dir() for command in ("compare", "sweep", "cohort", "search"))


def variants(run: PageRun) -> dict[str, object]:
    """Return the tables of the run's comparison, sweep, cohort and search.

    Raises:
        LeftOutError: If none is finished.
    """
    tables = list(recorded_tables(run.path, run.report.recipe))
    if not tables:
        raise LeftOutError("The comparison is not finished: run kdpipe compare, sweep or cohort again.")
    return {"tables": tables}


def _classes(run: PageRun) -> Table | None:
    """Return the accuracy of every class, the lowest median over the main networks first."""
    rows = [row for kind in MAIN_KINDS if (row := run.row(kind)) and row.per_class]
    if not rows:
        return None
    columns = list(zip(*(row.per_class or () for row in rows), strict=False))

    def difficulty(number: int) -> float:
        known = [row.accuracy_mean for row in columns[number] if row.accuracy_mean is not None]
        return median(known) if known else 101.0

    cells = [
        [
            columns[number][0].name,
            columns[number][0].num_samples,
            *(mean_std(row.accuracy_mean, row.accuracy_std) for row in columns[number]),
        ]
        for number in sorted(range(len(columns)), key=difficulty)[:MAX_CLASSES]
    ]
    headers = ["class", "test images", *(row.name for row in rows)]
    shown = f": {MAX_CLASSES:,} of {len(columns):,} classes" if len(columns) > MAX_CLASSES else ""
    return Table(f"Test accuracy by class, %, the lowest first{shown}", headers, cells)


def tradeoff(run: PageRun) -> dict[str, object]:
    """Return the Pareto plot's panels.

    Raises:
        LeftOutError: If no network has a file.
    """
    points = tradeoff_points(run.report)
    if not points:
        raise LeftOutError("No network of this run has an ONNX file yet.")
    batch_size = run.report.latency.batch_sizes[-1] if run.report.latency else None
    charts = pareto_panels(points, title=tradeoff_title(run.report))
    return {"charts": charts, "caption": CAPTION, "batch_size": batch_size}
