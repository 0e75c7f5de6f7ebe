"""The second table of `kdpipe report`: what networks have learnt from the teacher, and which class they know least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from pipeline.terminal.output import printable
from stages.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.report.report import Row

LONGEST_NAME = 20
"""So much of a class's name the table has room for; --json has all of it."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A class: the percentage of its test samples that are recognised, over the seeds; None where it has none."""

    name: str
    accuracy_mean: float | None
    accuracy_std: float | None
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What the last look at a network found, over its seeds: stages.examine.Examined in percent, and in nats for
    teacher_kl. None where it is not known: no teacher asked, too few classes, one seed, or a job of an older kdpipe.
    """

    top5_mean: float | None = None
    top5_std: float | None = None
    agreement_mean: float | None = None
    agreement_std: float | None = None
    teacher_kl_mean: float | None = None
    teacher_kl_std: float | None = None
    ece_mean: float | None = None
    ece_std: float | None = None
    per_class: list[ClassRow] | None = None


def read_learnt(results: Mapping[Path, Mapping[str, Any]]) -> Learnt:
    """What the results of a network's jobs, by their folders, say of it. Raises RunError where one is damaged."""
    found = {job: result["examined"] for job, result in results.items() if result.get("examined") is not None}
    if not found:
        return Learnt()
    try:
        return _learnt(list(found.values()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        folders = ", ".join(str(job) for job in found)
        raise RunError(
            f"what is under 'examined' in the result.json of {folders} is damaged ({error!r}): delete the damaged "
            "folder, and run again."
        ) from error


def print_learnt(console: Console, rows: Sequence[Row]) -> None:
    """Write the second table, for people; nothing where no network was examined."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if all(row.ece_mean is None for row in rows):
        return
    table = Table(box=box.SIMPLE, title="What they learnt from the teacher", title_justify="left")
    table.add_column("network", no_wrap=True)
    for header in (
        "top-1 %",
        "top-5 %",
        "agrees with the teacher %",
        "KL from the teacher (nats)",
        "ECE %",
        "worst class %",
    ):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            with_spread(row.accuracy_mean, row.accuracy_std),
            with_spread(row.top5_mean, row.top5_std),
            with_spread(row.agreement_mean, row.agreement_std),
            with_spread(row.teacher_kl_mean, row.teacher_kl_std, digits=3),
            with_spread(row.ece_mean, row.ece_std),
            Text(worst_class(row)),  # Text: a name with brackets is no markup
        )
    console.print(table)


def with_spread(average: float | None, spread: float | None, *, digits: int = 2) -> str:
    """Mean ± standard deviation, as far as they are known."""
    if average is None:
        return "-"
    return f"{average:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _learnt(found: Sequence[Mapping[str, Any]]) -> Learnt:
    figures: dict[str, float | None] = {}
    for name, scale in (("top5", 100), ("agreement", 100), ("teacher_kl", 1), ("ece", 100)):
        known = [scale * one[name] for one in found if one[name] is not None]
        figures[f"{name}_mean"], figures[f"{name}_std"] = _spread(known)
    classes = zip(*(one["per_class"] for one in found), strict=True)
    return Learnt(**figures, per_class=[_class_row(over_seeds) for over_seeds in classes])


def _class_row(over_seeds: Sequence[Mapping[str, Any]]) -> ClassRow:
    average, spread = _spread([100 * one["accuracy"] for one in over_seeds if one["accuracy"] is not None])
    first = over_seeds[0]
    return ClassRow(
        name=str(first["name"]), accuracy_mean=average, accuracy_std=spread, num_samples=int(first["num_samples"])
    )


def _spread(figures: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation: None of no figures, and of one."""
    return mean(figures) if figures else None, stdev(figures) if len(figures) > 1 else None


def worst_class(row: Row) -> str:
    """The class that is recognised least, the first of several, and how often."""
    measured = [(one.accuracy_mean, at) for at, one in enumerate(row.per_class or ()) if one.accuracy_mean is not None]
    if row.per_class is None or not measured:
        return "-"
    worst = row.per_class[min(measured)[1]]
    name = worst.name if len(worst.name) <= LONGEST_NAME else worst.name[: LONGEST_NAME - 3] + "..."
    return f"{printable(name)}: {with_spread(worst.accuracy_mean, worst.accuracy_std)}"
