"""The tables of a report, used by the terminal and the HTML page alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdpipe.pipeline.report.differences import NetworkDifference, p_text
from kdpipe.pipeline.report.formatting import integer, interval_text, kib, mean_std, share, size_ratio
from kdpipe.pipeline.report.rows import Report, Row
from kdpipe.pipeline.terminal.output import printable
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.compress.artifacts.latency_record import LatencyByBatch, timed_in
from kdpipe.stages.compress.targets import TITLES
from kdpipe.stages.evaluation.main_metric import DECISIONS, MAP, METRICS, R2, TEACHER_R2

MAX_CLASS_NAME = 20
"""Letters of a class name in a table; --json has the whole name."""


def report_tables(report: Report) -> Iterator[Table]:
    """Yield the tables that the report has figures for."""
    if not report.rows:
        return
    yield _results(report.rows)
    if report.differences:
        yield _differences(report)
    yield _costs(report)
    if any(row.ece_mean is not None or row.agreement_mean is not None for row in report.rows):
        yield _agreement(report.rows)
    if any(row.knn_mean is not None for row in report.rows):
        yield _embeddings(report.rows)
    if report.recovered:
        yield _recovered(report)


def _results(rows: Sequence[Row]) -> Table:
    validates = any(row.validation_mean is not None for row in rows)
    headers = ["network", f"{rows[0].tested} %", "95 % interval"]
    headers += ["validation %", "its best epoch %"] if validates else ["best epoch %"]
    headers += ["seeds", "parameters", "ONNX file", "ONNX = torch %"]
    cells = [
        [
            row.name,
            mean_std(row.accuracy_mean, row.accuracy_std),
            interval_text(row.interval),
            *([mean_std(row.validation_mean)] if validates else []),
            mean_std(row.best_accuracy_mean),
            row.num_seeds,
            integer(row.num_parameters),
            kib(row.file_bytes),
            mean_std(row.onnx_agreement),
        ]
        for row in rows
    ]
    return Table("Results", headers, cells)


def _differences(report: Report) -> Table:
    names = {row.kind: row.name for row in report.rows}
    headers = ["network", "against", "points", "95 % interval", "p"]
    bases = {(one.num_images, one.num_seeds) for one in report.differences}
    headers += [] if len(bases) == 1 else ["test images", "seeds"]
    cells = [
        [
            names[one.kind],
            names[one.against],
            mean_std(one.points, signed=True),
            _interval_of(one),
            p_text(one.p),
            *([] if len(bases) == 1 else [integer(one.num_images), one.num_seeds]),
        ]
        for one in report.differences
    ]
    basis = report.differences[0].basis if len(bases) == 1 else ""
    caption = f"Differences of {report.rows[0].tested}, in percentage points{': ' * bool(basis)}{basis}"
    return Table(caption, headers, cells, num_names=2)


def _interval_of(difference: NetworkDifference) -> str:
    text = interval_text(difference.interval, signed=True)
    return text if difference.paired or "images" not in text else f"{text}, unpaired"


def _costs(report: Report) -> Table:
    """Return MACs, sizes and latencies; networks that share a file have one row."""
    latency, caption = report.latency, "Cost (onnxruntime)"
    if latency is not None:
        threads = "one thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
        caption += f": {threads} of {printable(latency.cpu)}, ms per batch, median (95th percentile)"
    sizes = latency.batch_sizes if latency else []
    cells = []
    for row in report.rows:
        if row.kind != row.timed_as and not (latency and row.kind in latency.files):
            continue
        ratios = [size_ratio(row.of_teacher), size_ratio(row.of_student)]
        cells.append([row.name, integer(row.num_macs), *ratios, *_times(row.latency_ms, sizes)])
        for target, title in TITLES.items():
            if latency and (found := latency.files.get(timed_in(row.kind, target))):
                cells.append([f"{row.name} in {title}", integer(row.num_macs), "-", "-", *_times(found, sizes)])
    headers = ["network", "MACs", "size / teacher's", "size / student's"]
    return Table(caption, [*headers, *(f"batch of {size}" for size in sizes)], cells)


def _times(latency: LatencyByBatch | None, sizes: Sequence[int]) -> list[str]:
    """Return the latency of a file at each batch size."""
    times = [latency[str(size)] if latency else None for size in sizes]
    return ["-" if ms is None else f"{ms['p50_ms']:.3f} ({ms['p95_ms']:.3f})" for ms in times]


def _agreement(rows: Sequence[Row]) -> Table:
    title = "Agreement with the teacher"
    if METRICS[rows[0].metric] in (MAP, DECISIONS, R2, TEACHER_R2):
        is_r2 = METRICS[rows[0].metric] in (R2, TEACHER_R2)
        headers = ["network", "R² of its outputs %"] if is_r2 else ["network", "same labels %", "KL (nats)"]
        cells = [
            [
                row.name,
                mean_std(row.agreement_mean, row.agreement_std),
                *([] if is_r2 else [mean_std(row.teacher_kl_mean, row.teacher_kl_std, digits=3)]),
            ]
            for row in rows
        ]
        return Table(title, headers, cells)
    headers = ["network", "top-1 %", "top-5 %", "same top-1 %", "KL (nats)", "ECE %", "worst class %"]
    cells = [
        [
            row.name,
            mean_std(row.accuracy_mean, row.accuracy_std),
            mean_std(row.top5_mean, row.top5_std),
            mean_std(row.agreement_mean, row.agreement_std),
            mean_std(row.teacher_kl_mean, row.teacher_kl_std, digits=3),
            mean_std(row.ece_mean, row.ece_std),
            worst_class(row),
        ]
        for row in rows
    ]
    return Table(title, headers, cells)


def _embeddings(rows: Sequence[Row]) -> Table:
    cells = [[row.name, mean_std(row.knn_mean), mean_std(row.linear_probe_mean)] for row in rows]
    return Table("Accuracy of classifiers of the embeddings", ["network", "k-NN %", "linear probe %"], cells)


def _recovered(report: Report) -> Table:
    headers = ["network", "fine-tuned with hard labels", "with the teacher's stores", "recovered"]
    cells = [
        [
            row.name,
            *(mean_std(lost, signed=True) for lost in (row.points_lost_alone, row.points_lost)),
            share(row.share) if row.share is not None else "the loss is not clear",
        ]
        for row in report.recovered
    ]
    what = METRICS[report.rows[0].metric].title
    return Table(f"{what[:1].upper()}{what[1:]} lost by compression, in percentage points", headers, cells)


def worst_class(row: Row) -> str:
    """Return the class with the lowest accuracy (the first of several) and its accuracy."""
    measured = [by_class for by_class in row.per_class or () if by_class.accuracy_mean is not None]
    if not measured:
        return "-"
    worst = min(measured, key=lambda by_class: by_class.accuracy_mean or 0.0)
    name = worst.name if len(worst.name) <= MAX_CLASS_NAME else worst.name[: MAX_CLASS_NAME - 3] + "..."
    return f"{printable(name)}: {mean_std(worst.accuracy_mean, worst.accuracy_std)}"
