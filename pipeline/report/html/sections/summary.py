"""The top of a run's page: what came of it in one sentence, and the numbers to remember."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, stdev

from pipeline.page.markup import Html, element, join
from pipeline.page.read import PageRun
from pipeline.report.compressed import num_bytes
from pipeline.report.examined import with_spread
from pipeline.report.report import Row

LEAST_GAP = 0.1
"""Points between teacher and student alone below which there is no gap worth a share."""


@dataclass(frozen=True)
class Gain:
    """What distillation was worth, in points of test accuracy: over the seeds that both students have finished.

    share_closed: of the gap between the student alone and the teacher; None where there is hardly one.
    """

    points: float
    std: float | None
    num_seeds: int
    share_closed: float | None

    @property
    def is_within_spread(self) -> bool:
        """Whether the seeds differ by more than what distillation was worth."""
        return self.std is not None and abs(self.points) < self.std


def gain_of(run: PageRun) -> Gain | None:
    """None as long as no seed has both students."""
    alone, distilled, teacher = run.network("alone"), run.network("student"), run.row("teacher")
    if alone is None or distilled is None:
        return None
    results = [(one.result, other.result) for one, other in zip(alone.jobs, distilled.jobs, strict=False)]
    pairs = [(one["accuracy"], other["accuracy"]) for one, other in results if one and other]
    if not pairs:
        return None
    points = [100 * (taught - own) for own, taught in pairs]
    gap = teacher.accuracy_mean - mean(100 * own for own, _ in pairs) if teacher else 0.0
    share = mean(points) / gap if gap >= LEAST_GAP else None
    return Gain(mean(points), stdev(points) if len(points) > 1 else None, len(points), share)


def sentence(run: PageRun) -> str:
    """What came of the run."""
    gain, distilled, teacher = gain_of(run), run.row("student"), run.row("teacher")
    if gain is not None and distilled is not None:
        return _gained(gain, distilled, teacher)
    if not run.report.rows:
        return "Nothing of this run is finished yet."
    best = max(run.report.rows, key=lambda row: row.accuracy_mean)
    named = f"Of the networks that are finished, {best.name} answers best: "
    return f"{named}{with_spread(best.accuracy_mean, best.accuracy_std)} % of the test images."


def _gained(gain: Gain, distilled: Row, teacher: Row | None) -> str:
    what = f"{with_spread(abs(gain.points), gain.std)} points {'more' if gain.points >= 0 else 'fewer'}"
    seeds = "one seed" if gain.num_seeds == 1 else f"{gain.num_seeds} seeds"
    right = with_spread(distilled.accuracy_mean, distilled.accuracy_std)
    text = (
        f"Taught by what its teacher said, the student gets {right} % of the test images right: {what} than the same "
        f"student without a teacher ({seeds})"
    )
    if gain.is_within_spread:
        return f"{text}, which is within the spread between seeds."
    if gain.share_closed is None or teacher is None:
        return f"{text}."
    if gain.share_closed >= 1:
        return f"{text}, and as many as the teacher or more ({teacher.accuracy_mean:.2f} %)."
    if gain.share_closed <= 0:
        return f"{text}; the teacher gets {teacher.accuracy_mean:.2f} %."
    share = f"{100 * gain.share_closed:.0f} %"
    return f"{text}. That closes {share} of the gap to the teacher's {teacher.accuracy_mean:.2f} %."


def tiles(run: PageRun) -> Html:
    """The key numbers."""
    return element("div", join(_tiles(run)), kind="tiles")


def _tiles(run: PageRun) -> Iterator[Html]:
    for kind, label in (
        ("teacher", "teacher, test accuracy"),
        ("alone", "student alone"),
        ("student", "student distilled"),
    ):
        if (row := run.row(kind)) is not None:
            name = row.name if row.name == "student given" else label
            yield tile(f"{row.accuracy_mean:.2f} %", name, _spread(row))
    if (gain := gain_of(run)) is not None:
        closed = "" if gain.share_closed is None else f"{100 * gain.share_closed:.0f} % of the gap to the teacher"
        closed = "within the spread between seeds" if gain.is_within_spread else closed
        yield tile(f"{gain.points:+.2f}", "points by distillation", closed)
    smallest = min(
        (row for row in run.report.rows if row.file_bytes), key=lambda row: row.file_bytes or 0, default=None
    )
    if smallest is not None and smallest.kind not in ("teacher", "alone", "student"):
        yield tile(num_bytes(smallest.file_bytes), f"smallest file: {smallest.name}", f"{smallest.accuracy_mean:.2f} %")
    student = run.row("student")
    if student is not None and student.of_teacher:
        yield tile(
            f"1/{student.of_teacher:.1f}", "of the teacher's size", f"the student's {num_bytes(student.file_bytes)}"
        )


def _spread(row: Row) -> str:
    seeds = "1 seed" if row.num_seeds == 1 else f"{row.num_seeds} seeds"
    return seeds if row.accuracy_std is None else f"± {row.accuracy_std:.2f} over {seeds}"


def tile(value: str, label: str, more: str = "") -> Html:
    return element(
        "div", element("b", value), element("span", label), element("span", more) if more else "", kind="tile"
    )
