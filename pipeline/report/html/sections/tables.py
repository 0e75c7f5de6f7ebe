"""The tables of the terminal's report, as the page has them."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from pipeline.page.markup import Html, details, join, note, table
from pipeline.page.read import PageRun
from pipeline.report.compressed import fraction, num_bytes
from pipeline.report.examined import with_spread, worst_class
from pipeline.report.report import Row


def result_tables(run: PageRun) -> Html:
    """What each network is worth, takes and has learnt; and what compression cost."""
    return join([*_tables(run), *_unfinished(run)])


def _tables(run: PageRun) -> Iterator[Html]:
    rows = run.report.rows
    if rows:
        yield table("What each network is worth", WORTH, map(_worth, rows))
        yield _costs(run)
    if any(row.ece_mean is not None for row in rows):
        yield table("What they learnt from the teacher", LEARNT, map(_learnt, rows))
        yield _classes(run)
    if run.report.won_back:
        headers = ["network", "fine-tuned with hard labels", "with the teacher's stores", "won back"]
        cells = (
            [
                one.name,
                f"{one.points_lost_alone:+.2f}",
                f"{one.points_lost:+.2f}",
                "-" if one.share is None else f"{100 * one.share:.0f} %",
            ]
            for one in run.report.won_back
        )
        yield table("What compression cost, in points of accuracy", headers, cells)


WORTH = ["network", "test accuracy %", "best epoch %", "seeds", "parameters", "ONNX file", "ONNX = torch %"]

LEARNT = [
    "network",
    "top-5 %",
    "agrees with the teacher %",
    "KL from the teacher, nats",
    "calibration error (ECE) %",
    "worst class %",
]


def _worth(row: Row) -> list[object]:
    return [
        row.name,
        with_spread(row.accuracy_mean, row.accuracy_std),
        f"{row.best_accuracy_mean:.2f}",
        row.num_seeds,
        f"{row.num_parameters:,}",
        num_bytes(row.file_bytes),
        with_spread(row.onnx_agreement, None),
    ]


def _learnt(row: Row) -> list[object]:
    return [
        row.name,
        with_spread(row.top5_mean, row.top5_std),
        with_spread(row.agreement_mean, row.agreement_std),
        with_spread(row.teacher_kl_mean, row.teacher_kl_std, digits=3),
        with_spread(row.ece_mean, row.ece_std),
        worst_class(row),
    ]


def _costs(run: PageRun) -> Html:
    """What each file takes; networks that share a file are shown once."""
    latency, caption = run.report.latency, "What they take"
    if latency is not None:
        threads = "one thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
        caption += f": onnxruntime on {threads} of {latency.cpu}, ms, median (95th percentile)"
    sizes = latency.batch_sizes if latency else []
    headers = ["network", "multiply-accumulates", "of the teacher's size", "of the student's"]
    lines: list[list[object]] = []
    for row in run.report.rows:
        if row.kind != row.timed_as and not (latency and row.kind in latency.files):
            continue
        times = [row.latency_ms[str(size)] if row.latency_ms else None for size in sizes]
        lines.append(
            [
                row.name,
                "-" if row.num_macs is None else f"{row.num_macs:,}",
                fraction(row.of_teacher),
                fraction(row.of_student),
                *("-" if one is None else f"{one['p50_ms']:.3f} ({one['p95_ms']:.3f})" for one in times),
            ]
        )
    return table(caption, [*headers, *(f"batch of {size}" for size in sizes)], lines)


def _classes(run: PageRun) -> Html:
    """Every class, the worst for the student alone first."""
    rows = [row for kind in ("teacher", "alone", "student") if (row := run.row(kind)) and row.per_class]
    if not rows:
        return Html()
    num_classes = min(len(row.per_class or ()) for row in rows)

    def hardest(at: int) -> float:
        known = [one for row in rows if (one := (row.per_class or [])[at].accuracy_mean) is not None]
        return median(known) if known else 101.0

    lines: list[list[object]] = []
    for at in sorted(range(num_classes), key=hardest):
        found = [(row.per_class or [])[at] for row in rows]
        cells = (with_spread(one.accuracy_mean, one.accuracy_std) for one in found)
        lines.append([found[0].name, found[0].num_samples, *cells])
    headers = ["class", "test images", *(row.name for row in rows)]
    return details("Every class", table("Test accuracy by class, %, the hardest first", headers, lines))


def _unfinished(run: PageRun) -> Iterator[Html]:
    if run.report.missing:
        yield note(f"Not done yet: {', '.join(run.report.missing)}: run the recipe again.")
    if (run.path / "compare").is_dir():
        yield note("Ways of teaching are compared in this run: kdpipe compare prints their table.")
