"""Top of a run's page: the result in one sentence, and key numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from kdpipe.pipeline.report.formatting import kib, mean_std, num_seeds, share, size_ratio
from kdpipe.pipeline.report.html.read import PageRun
from kdpipe.pipeline.report.rows import Row, mean_and_std

MIN_GAP = 0.1
"""Percentage points between teacher and undistilled student; of a smaller gap no closed share is given."""


@dataclass(frozen=True)
class Gain:
    """Percentage points gained by distillation, over the seeds for which both students are finished.

    Attributes:
        share_closed: Closed share of the gap between the undistilled student and the teacher; None if below MIN_GAP.
    """

    points: float
    std: float | None
    num_seeds: int
    share_closed: float | None

    @property
    def is_within_spread(self) -> bool:
        """Whether the standard deviation over seeds exceeds the gain."""
        return self.std is not None and abs(self.points) < self.std


def summary(run: PageRun) -> dict[str, object]:
    return {"sentence": sentence(run), "tiles": list(_tiles(run))}


def gain_of(run: PageRun) -> Gain | None:
    """Return the gain by distillation; None until one seed has both students."""
    alone, distilled, teacher = run.network("alone"), run.network("student"), run.row("teacher")
    if alone is None or distilled is None:
        return None
    results = [(without.result, with_.result) for without, with_ in zip(alone.jobs, distilled.jobs, strict=False)]
    pairs = [(without["accuracy"], with_["accuracy"]) for without, with_ in results if without and with_]
    if not pairs:
        return None
    gained = [100 * (with_teacher - without) for without, with_teacher in pairs]
    gap = teacher.accuracy_mean - mean(100 * without for without, _ in pairs) if teacher else 0.0
    return Gain(mean(gained), mean_and_std(gained)[1], len(gained), mean(gained) / gap if gap >= MIN_GAP else None)


def sentence(run: PageRun) -> str:
    """Return what was gained, in one sentence, and which networks are at chance."""
    useless = [one.name for one in run.networks if any((job.result or {}).get("at_chance") for job in one.done)]
    note = f" At chance, no better than guessing: {', '.join(useless)}." if useless else ""
    return f"{_result(run)}{note}"


def _result(run: PageRun) -> str:
    gain, distilled, teacher = gain_of(run), run.row("student"), run.row("teacher")
    if gain is not None and distilled is not None:
        return _gained(gain, distilled, teacher)
    if not run.report.rows:
        return "No network of this run is finished yet."
    if distilled is not None and run.network("alone") is None:
        goal = f"; the teacher reaches {teacher.accuracy_mean:.2f} %" if teacher else ""
        return (
            f"The distilled student reaches {_accuracy(distilled)} % test accuracy{goal}. It was not trained alone "
            "(student.baseline = false), so that its gain by distillation is not known."
        )
    best = max(run.report.rows, key=lambda row: row.accuracy_mean)
    return f"Best network finished so far: {best.name}, {_accuracy(best)} % test accuracy."


def _gained(gain: Gain, distilled: Row, teacher: Row | None) -> str:
    change = f"{mean_std(abs(gain.points), gain.std)} points {'more' if gain.points >= 0 else 'less'}"
    text = (
        f"The distilled student reaches {_accuracy(distilled)} % test accuracy: {change} than the same student "
        f"trained without a teacher ({num_seeds(gain.num_seeds)})"
    )
    if gain.is_within_spread:
        return f"{text}, which is within the spread between seeds."
    if gain.share_closed is None or teacher is None:
        return f"{text}."
    if not 0 < gain.share_closed < 1:
        return f"{text}; the teacher reaches {teacher.accuracy_mean:.2f} %."
    return f"{text}. That closes {share(gain.share_closed)} of the gap to the teacher's {teacher.accuracy_mean:.2f} %."


def _accuracy(row: Row) -> str:
    return mean_std(row.accuracy_mean, row.accuracy_std)


def _tiles(run: PageRun) -> Iterator[tuple[str, str, str]]:
    for kind in ("teacher", "alone", "student"):
        if (row := run.row(kind)) is not None:
            spread = "" if row.accuracy_std is None else f"± {row.accuracy_std:.2f} over "
            yield (f"{row.accuracy_mean:.2f} %", f"{row.name}, test accuracy", spread + num_seeds(row.num_seeds))
    if (gain := gain_of(run)) is not None:
        closed = "" if gain.share_closed is None else f"{share(gain.share_closed)} of the gap to the teacher"
        closed = "within the spread between seeds" if gain.is_within_spread else closed
        yield (mean_std(gain.points, signed=True), "points by distillation", closed)
    with_file = [row for row in run.report.rows if row.file_bytes]
    smallest = min(with_file, key=lambda row: row.file_bytes or 0, default=None)
    if smallest is not None and smallest.kind not in ("teacher", "alone", "student"):
        yield (kib(smallest.file_bytes), f"smallest file: {smallest.name}", f"{smallest.accuracy_mean:.2f} %")
    student = run.row("student")
    if student is not None and student.of_teacher:
        yield (size_ratio(student.of_teacher), "of the teacher's size", f"student: {kib(student.file_bytes)}")
