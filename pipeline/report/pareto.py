"""Plot accuracy against file size and against latency, with the Pareto front, as one SVG for light and dark pages.

A network is on the front if no other is at least as good in both values and better in one. The front is drawn as
steps: between two networks there is none. The accuracy axis is logarithmic in the error, so that a teacher far above
or below the students leaves them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kdpipe.pipeline.report.chart import add_axes, color, drawing, error_axis, log_axis, new_figure, spread, svg
from kdpipe.pipeline.report.formatting import bytes_text, shortened
from kdpipe.pipeline.report.networks import compressed_folder, style_of
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report
from kdpipe.stages.evaluation.intervals import Interval
from kdpipe.stages.evaluation.main_metric import ACCURACY, METRICS
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store.fs.atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    "Filled: no other network is as accurate at as little cost; bars: 95 % confidence intervals; the accuracy axis is "
    "logarithmic in the error."
)

PANEL_WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 44, 226, 36, 46
"""In user units; names are written between RIGHT and PANEL_WIDTH."""

ROW, MAX_LETTERS = 16, 25

MARK_AT = 1.035
"""Where the mark before a name is, in widths of the panel."""


@dataclass(frozen=True)
class Point:
    """A network's accuracy and its interval in percent, ONNX file size in bytes, latency in ms, and kind."""

    name: str
    accuracy_percent: float
    interval: Interval | None
    file_bytes: int
    latency_ms: float | None
    kind: str = "student"
    metric: str = ACCURACY.title

    @property
    def ends(self) -> tuple[float, float]:
        """The accuracies between which it is."""
        if self.interval is None:
            return self.accuracy_percent, self.accuracy_percent
        return max(self.interval.low, 0.0), min(self.interval.high, 100.0)


Cost = tuple[Point, float]
"""A point with its cost in one panel."""


def write_pareto_plot(run: Path) -> None:
    """Write pareto.svg into the folder of the compressed students, once latencies were measured. Raises OSError."""
    report, recipe = read_report(run), read_json_file(run / "recipe.json") or {}
    root = compressed_folder(recipe, run)
    if report.latency is not None and root.is_dir():
        plot = pareto_svg(tradeoff_points(report), title=tradeoff_title(report))
        write_atomically(root / "pareto.svg", plot.encode())


def tradeoff_points(report: Report) -> list[Point]:
    """Return the networks that have a file, without the hard-label baselines."""
    largest = str(report.latency.batch_sizes[-1]) if report.latency else ""
    return [
        Point(
            row.name,
            row.accuracy_mean,
            row.interval,
            row.file_bytes,
            row.latency_ms[largest]["p50_ms"] if row.latency_ms else None,
            row.kind,
            METRICS[row.metric].title,
        )
        for row in report.rows
        if row.file_bytes and "hard labels" not in row.name
    ]


def tradeoff_title(report: Report) -> str:
    what = METRICS[report.rows[0].metric].title
    if report.latency is None:
        return f"{report.recipe}: {what} and size"
    return f"{report.recipe}: {what}, size and latency (batch of {report.latency.batch_sizes[-1]})"


@drawing()
def pareto_svg(points: Sequence[Point], *, title: str) -> str:
    """Return a stand-alone SVG file with both panels."""
    height = _height(points)
    figure = new_figure(2 * PANEL_WIDTH, height + 24)
    figure.text(0.01, 1 - 16 / (height + 24), shortened(title, 90), fontsize=15)
    for number, panel in enumerate(_panels(points)):
        left = number * PANEL_WIDTH
        _draw(add_axes(figure, left + LEFT, TOP + 24, left + RIGHT, height + 24 - BOTTOM), points, *panel)
    colors = (Path(__file__).parent / "html" / "templates" / "colors.css").read_text(encoding="utf-8")
    style = f"<style>\n{colors}svg {{ background: var(--paper); font-family: system-ui, sans-serif; }}\n</style>"
    drawn = str(svg(figure, title, CAPTION))
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "</desc>", f"</desc>{style}", 1
    )


@drawing()
def pareto_panels(points: Sequence[Point], *, title: str) -> list[Markup]:
    """Return each panel as an <svg> element of its own."""
    panels = []
    for name, costs, unit in _panels(points):
        figure = new_figure(PANEL_WIDTH, _height(points))
        _draw(add_axes(figure, LEFT, TOP, RIGHT, _height(points) - BOTTOM), points, name, costs, unit)
        panels.append(svg(figure, f"{title}: {name}", CAPTION))
    return panels


def pareto_front(costs: Sequence[Cost]) -> list[Cost]:
    """Return the points on the front, by cost; equal ones are all on it."""

    def is_beaten(point: Point, cost: float) -> bool:
        return any(
            other_cost <= cost
            and other.accuracy_percent >= point.accuracy_percent
            and (other_cost < cost or other.accuracy_percent > point.accuracy_percent)
            for other, other_cost in costs
        )

    return sorted((pair for pair in costs if not is_beaten(*pair)), key=lambda pair: pair[1])


def _panels(points: Sequence[Point]) -> Iterator[tuple[str, list[Cost], Callable[[float], str]]]:
    """Yield each panel's title, points, and the format of its ticks."""
    by_size = [(point, float(point.file_bytes)) for point in points]
    by_time = [(point, point.latency_ms) for point in points if point.latency_ms is not None]
    what = points[0].metric if points else ACCURACY.title
    yield f"{what}, % by ONNX file size", by_size, bytes_text
    yield f"{what}, % by latency", by_time, "{:.4g} ms".format


def _height(points: Sequence[Point]) -> int:
    return TOP + BOTTOM + max(250, ROW * (len(points) + 2))


def _draw(axes: Axes, points: Sequence[Point], title: str, costs: Sequence[Cost], unit: Callable[[float], str]) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    error_axis(axes, [end for point in points for end in point.ends] or [0.0, 100.0])
    if not costs:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=color("quiet"))
        return
    least, most = (find(cost for _, cost in costs) for find in (min, max))
    room = max((most / least) ** 0.08, 1.1)
    log_axis(axes, "x", least / room, most * room, unit)
    axes.tick_params(axis="x", labelrotation=30)
    front = pareto_front(costs)
    x = [*(cost for _, cost in front), axes.get_xlim()[1]]
    y = [point.accuracy_percent for point, _ in front]
    axes.step(x, [*y, y[-1]], where="post", color=color("quiet"), linewidth=1.2)
    for point, cost in costs:
        shade = color(style_of(point.kind).color)
        axes.plot([cost, cost], point.ends, color=shade, linewidth=1.2)
        _mark(axes, point, cost, point.accuracy_percent, is_filled=(point, cost) in front)
    _label(axes, costs, front)


def _mark(axes: Axes, point: Point, x: float, y: float, *, is_filled: bool, **options: Any) -> None:
    style = style_of(point.kind)
    shade = color(style.color)
    fill = shade if is_filled else color("paper")
    axes.plot([x], [y], style.marker, ms=8, mec=shade, mfc=fill, mew=2, **options)


def _label(axes: Axes, costs: Sequence[Cost], front: Sequence[Cost]) -> None:
    """Write marks and names right of the panel at their points' heights, moved apart, with a line from each point."""
    figure = axes.get_figure()
    assert figure is not None
    height = axes.get_position().height * figure.get_figure(root=True).get_size_inches()[1] * 72
    to_share = axes.transData + axes.transAxes.inverted()
    heights = [height * (1 - to_share.transform((cost, point.accuracy_percent))[1]) for point, cost in costs]
    for (point, cost), place in zip(costs, spread(heights, ROW, height), strict=True):
        share, shade = 1 - place / height, color(style_of(point.kind).color)
        line = {"arrowstyle": "-", "linestyle": ":", "color": shade, "shrinkA": 0, "shrinkB": 5}
        position = (cost, point.accuracy_percent)
        axes.annotate("", position, (1.0, share), textcoords="axes fraction", arrowprops=line)
        is_filled = (point, cost) in front
        _mark(axes, point, MARK_AT, share, is_filled=is_filled, transform=axes.transAxes, clip_on=False)
        name = shortened(point.name, MAX_LETTERS)
        axes.annotate(name, (MARK_AT, share), (8, 0), "axes fraction", "offset points", va="center")
