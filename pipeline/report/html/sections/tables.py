"""Sections of the report's tables, and of accuracy against size and latency."""

from __future__ import annotations

from statistics import median

from kdpipe.pipeline.report.formatting import kib, mean_std
from kdpipe.pipeline.report.html.read import MAIN_KINDS, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.tables import Table, report_tables
from kdpipe.pipeline.report.tradeoff import tradeoff_points, tradeoff_title


def results(run: PageRun) -> dict[str, object]:
    return {
        "tables": list(report_tables(run.report)),
        "classes": _classes(run),
        "missing": run.report.missing,
        "has_variants": (run.path / "compare").is_dir(),
    }


def _classes(run: PageRun) -> Table | None:
    """Return the accuracy of every class, the lowest median over the main networks first."""
    rows = [row for kind in MAIN_KINDS if (row := run.row(kind)) and row.per_class]
    if not rows:
        return None
    columns = list(zip(*(row.per_class or () for row in rows), strict=False))

    def difficulty(number: int) -> float:
        known = [one.accuracy_mean for one in columns[number] if one.accuracy_mean is not None]
        return median(known) if known else 101.0

    cells = [
        [
            columns[number][0].name,
            columns[number][0].num_samples,
            *(mean_std(one.accuracy_mean, one.accuracy_std) for one in columns[number]),
        ]
        for number in sorted(range(len(columns)), key=difficulty)
    ]
    headers = ["class", "test images", *(row.name for row in rows)]
    return Table("Test accuracy by class, %, the lowest first", headers, cells)


def tradeoff(run: PageRun) -> dict[str, object]:
    """Return the Pareto plot's panels and numbers.

    Raises:
        LeftOutError: If no network has a file.
    """
    from kdpipe.pipeline.report.pareto_svg import CAPTION, pareto_panels

    found = tradeoff_points(run.report)
    if not found:
        raise LeftOutError("No network of this run has an ONNX file yet.")
    batch_size = run.report.latency.batch_sizes[-1] if run.report.latency else None
    cells = [
        [
            one.name,
            mean_std(one.accuracy_percent, one.accuracy_std),
            kib(one.file_bytes),
            mean_std(one.latency_ms, digits=3),
        ]
        for one in found
    ]
    batch = "" if batch_size is None else f", batch of {batch_size}"
    headers = ["network", "test accuracy %", "ONNX file", f"latency, ms{batch}"]
    return {
        "charts": pareto_panels(found, title=tradeoff_title(run.report)),
        "caption": CAPTION,
        "batch_size": batch_size,
        "numbers": Table("Accuracy, size and latency", headers, cells),
    }
