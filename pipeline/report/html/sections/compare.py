"""Several runs on one page: their figures in one table, and their students' learning curves on the same axes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.page.curves import axes_for, curve_of, curve_panel
from pipeline.page.head import gain_of
from pipeline.page.markup import Html, LeftOutError, element, figure, join, key, safe, table
from pipeline.page.read import PageRun
from pipeline.report.compressed import num_bytes
from pipeline.report.examined import with_spread

HEADERS = (
    "run",
    "folder",
    "teacher %",
    "student alone %",
    "student distilled %",
    "points gained",
    "gap closed",
    "parameters",
    "ONNX file",
)


def comparison(runs: Sequence[PageRun]) -> Html:
    """The table, and the curves."""
    return join(
        [
            table("The runs side by side", HEADERS, map(_line, runs), num_names=2),
            element("h2", "Learning curves"),
            _curves(runs),
        ]
    )


def _line(run: PageRun) -> list[object]:
    gain, student = gain_of(run), run.row("student")
    rows = [run.row(kind) for kind in ("teacher", "alone", "student")]
    share = gain.share_closed if gain and not gain.is_within_spread else None
    return [
        element("a", run.report.recipe, href=f"#{run.key}top"),
        run.folder_name,
        *(with_spread(row.accuracy_mean, row.accuracy_std) if row else "-" for row in rows),
        _signed(gain.points, gain.std) if gain else "-",
        "-" if share is None else f"{100 * share:.0f} %",
        f"{student.num_parameters:,}" if student else "-",
        num_bytes(student.file_bytes) if student else "-",
    ]


def _signed(points: float, std: float | None) -> str:
    return f"{points:+.2f}" + ("" if std is None else f" ± {std:.2f}")


def _curves(runs: Sequence[PageRun]) -> Html:
    """A panel a run, with both of its students."""
    curves = [
        (run, [curve_of(one) for one in run.main if one.kind != "teacher" and any(job.epochs for job in one.jobs)])
        for run in runs
    ]
    try:
        axes = axes_for([curve for _, some in curves for curve in some])
    except LeftOutError as error:
        return element("p", error, kind="left-out")
    panels = [curve_panel(f"{run.report.recipe} ({run.folder_name})", some, [], axes) for run, some in curves if some]
    names = {curve.colour: curve.name for _, some in curves for curve in some}
    keys = join([key(colour, name) for colour, name in names.items()])
    text = safe("Thin: one seed. Thick: their mean, with its last value. All panels have the same axes. ")
    return figure(join([text, Html(f'<span class="keys">{keys}</span>')]), *panels)
