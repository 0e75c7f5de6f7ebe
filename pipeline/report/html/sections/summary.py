"""Top of a run's page: the verdict on distillation, and key numbers."""

from __future__ import annotations

from collections.abc import Iterator

from kdpipe.pipeline.report.formatting import interval_text, kib, mean_std, num_seeds, share, size_ratio
from kdpipe.pipeline.report.html.read import PageRun


def summary(run: PageRun) -> dict[str, object]:
    verdict = run.report.verdict
    return {"sentence": verdict.sentence, "advice": verdict.advice, "tiles": list(_tiles(run))}


def _tiles(run: PageRun) -> Iterator[tuple[str, str, str]]:
    for kind in ("teacher", "alone", "student"):
        if (row := run.row(kind)) is not None:
            spread = "" if row.accuracy_std is None else f"± {row.accuracy_std:.2f} over "
            interval = "" if row.interval is None else f"; 95 % interval {interval_text(row.interval)}"
            yield (
                f"{row.accuracy_mean:.2f} %",
                f"{row.name}, {row.tested}",
                spread + num_seeds(row.num_seeds) + interval,
            )
    if (gain := run.report.difference("student", "alone")) is not None:
        closed = run.report.verdict.share_closed
        more = (
            "not clear" if not gain.is_clear else "" if closed is None else f"{share(closed)} of the gap to the teacher"
        )
        yield (mean_std(gain.points, signed=True), "points by distillation", more)
    with_file = [row for row in run.report.rows if row.file_bytes]
    smallest = min(with_file, key=lambda row: row.file_bytes or 0, default=None)
    if smallest is not None and smallest.kind not in ("teacher", "alone", "student"):
        yield (kib(smallest.file_bytes), f"smallest file: {smallest.name}", f"{smallest.accuracy_mean:.2f} %")
    student = run.row("student")
    if student is not None and student.of_teacher:
        yield (size_ratio(student.of_teacher), "of the teacher's size", f"student: {kib(student.file_bytes)}")
