"""Accuracy against what a network takes: the Pareto picture's panels, and their numbers."""

from __future__ import annotations

from pipeline.page.markup import Html, LeftOutError, details, figure, join, table
from pipeline.page.read import PageRun
from pipeline.report.compressed import num_bytes, trade_points, trade_title
from pipeline.report.examined import with_spread
from pipeline.report.pareto import CAPTION, pareto_panels


def trade(run: PageRun) -> Html:
    """The section. Raises LeftOutError where no network has a file."""
    points = trade_points(run.report)
    if not points:
        raise LeftOutError("No network of this run has an ONNX file yet.")
    latency = run.report.latency
    caption = CAPTION[0].upper() + CAPTION[1:] + ". "
    if latency is None:
        caption += "Latencies are measured by kdpipe compress."
    else:
        caption += f"Latency: the median of a batch of {latency.batch_sizes[-1]} in onnxruntime."
    panels = [Html(panel) for panel in pareto_panels(points, title=trade_title(run.report))]
    batch = f", batch of {latency.batch_sizes[-1]}" if latency else ""
    cells = (
        [
            one.name,
            with_spread(one.accuracy_percent, one.accuracy_std),
            num_bytes(one.file_bytes),
            "-" if one.latency_ms is None else f"{one.latency_ms:.3f}",
        ]
        for one in points
    )
    headers = ["network", "test accuracy %", "ONNX file", f"latency, ms{batch}"]
    numbers = table("Accuracy, size and latency", headers, cells)
    return join([figure(caption, *panels, kind="panels wide"), details("These points as a table", numbers)])
