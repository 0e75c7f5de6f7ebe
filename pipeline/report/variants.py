"""The tables of `kdpipe compare`, `sweep`, `cohort` and `search`, on the terminal, in files and on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kdpipe.pipeline.recipe.sweep import short_names
from kdpipe.pipeline.report.differences import p_text
from kdpipe.pipeline.report.formatting import interval_text, mean_std, num_seeds
from kdpipe.pipeline.report.search import best_of_search, search_tables
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.intervals import Interval
from kdpipe.stages.evaluation.main_metric import main_percent, metric_of
from kdpipe.stages.training.job_dir import read_json_file

T = TypeVar("T")

RESULTS = "results.json"
"""The record of a comparison, sweep, cohort or search, in the folder of its command in a run."""

SEARCH_JOURNAL = "search/journal.log"
"""The journal of a search, in a run."""


def ranking_accuracy(row: Mapping[str, Any]) -> float:
    """Return the accuracy by which a row is ranked: on the validation images, or without any the test images."""
    accuracy: float = row["accuracy_mean"] if row["validation_mean"] is None else row["validation_mean"]
    return accuracy


def compare_table(recipe: str, results: Mapping[str, Any]) -> Table:
    """Return a comparison's table, the best variant first: on the validation images, if there are any."""
    first, teacher = results["rows"][0], results["teacher"]  # the student alone, unless student.baseline is false
    validates = all(row["validation_mean"] is not None for row in results["rows"])
    headers = ["variant", f"test {metric_of(first).title} %", f"over {first['name']}", "95 % interval", "p"]
    headers += ["validation %"] * validates
    headers += [f"step vs {first['name']}", "ms / step", "agreement %", "KL, nats", "best epoch %"]
    cells = [["teacher", f"{main_percent(teacher):.2f}", *[""] * len(headers)]] if teacher else []
    for row in sorted(results["rows"], key=ranking_accuracy, reverse=True):
        interval = Interval(**row["interval"]) if row["interval"] else None
        cells.append(
            [
                row["name"],
                mean_std(row["accuracy_mean"], row["accuracy_std"]),
                f"{row['accuracy_mean'] - first['accuracy_mean']:+.2f}",
                interval_text(interval, signed=True),
                p_text(row["p"]),
                *[mean_std(row["validation_mean"])] * validates,
                f"{row['ratio']:.2f}",
                f"{row['step_ms']:.2f}",
                mean_std(row["agreement_mean"]),
                mean_std(row["teacher_kl_mean"], digits=3),
                f"{row['best_accuracy_mean']:.2f}",
            ]
        )
    return Table(f"{recipe}: comparison over {num_seeds(len(first['accuracies']))}", headers, cells)


def sweep_table(recipe: str, found: Mapping[str, Any]) -> Table:
    """Return a sweep's table, the best combination first."""
    names, rows = short_names(found["keys"]), found["rows"]
    validates = all(row["validation_mean"] is not None for row in rows)
    tested = f"test {metric_of(rows[0]).title} %" if rows else "test accuracy %"
    headers = [*names.values(), tested, "alone %", "gain", "its 95 % interval"]
    headers += ["validation %"] * validates + ["agreement %", "KL, nats", "best epoch %"]
    cells = [
        [
            *map(str, row["settings"].values()),
            mean_std(row["accuracy_mean"], row["accuracy_std"]),
            mean_std(row["alone"]["accuracy_mean"], row["alone"]["accuracy_std"]) if row["alone"] else "-",
            mean_std(row["gain_mean"], signed=True),
            interval_text(Interval(**row["interval"]) if row["interval"] else None, signed=True),
            *[mean_std(row["validation_mean"])] * validates,
            mean_std(row["agreement_mean"]),
            mean_std(row["teacher_kl_mean"], digits=3),
            f"{row['best_accuracy_mean']:.2f}",
        ]
        for row in rows
    ]
    most = max((len(row["accuracies"]) for row in rows), default=0)
    return Table(f"{recipe}: {len(rows)} settings over {num_seeds(most)}", headers, cells, num_names=len(names))


def cohort_table(recipe: str, found: Mapping[str, Any]) -> Table:
    """Return a cohort's table: each network alone, each member, their mean, and the ensemble."""
    rows = found["rows"]
    validates = any(row["validation_mean"] is not None for row in rows)
    headers = ["network", f"test {metric_of(rows[0]).title} %", "over alone", "95 % interval", "p"]
    headers += ["validation %"] * validates + ["agreement %", "KL, nats", "best epoch %"]
    cells = [
        [
            row["name"],
            mean_std(row["accuracy_mean"], row["accuracy_std"]),
            "-" if row["alone_mean"] is None else f"{row['accuracy_mean'] - row['alone_mean']:+.2f}",
            interval_text(Interval(**row["interval"]) if row["interval"] else None, signed=True),
            p_text(row["p"]),
            *[mean_std(row["validation_mean"])] * validates,
            mean_std(row["agreement_mean"]),
            mean_std(row["teacher_kl_mean"], digits=3),
            f"{row['best_accuracy_mean']:.2f}",
        ]
        for row in rows
    ]
    title = f"{recipe}: cohort by {found['method']} over {num_seeds(len(rows[0]['accuracies']))}"
    return Table(title, headers, cells)


def recorded_tables(run: Path, recipe: str) -> Iterator[Table]:
    """Yield the tables of a run's comparison, sweep, cohort and search, as far as they were made.

    Raises:
        RunError: If a record is damaged.
    """
    tables = {
        "compare": lambda found: [compare_table(recipe, found)],
        "sweep": lambda found: [sweep_table(recipe, found)],
        "cohort": lambda found: [cohort_table(recipe, found)],
        "search": lambda found: list(search_tables(recipe, found)),
    }
    for made in _recorded(run, lambda command, found: tables[command](found)):
        yield from made


def best_variants(run: Path) -> str:
    """Return in sentences the best variant of a run's comparison, sweep, cohort and search.

    Raises:
        RunError: If a record is damaged.
    """
    return " ".join(filter(None, _recorded(run, _best)))


def _best(command: str, found: Mapping[str, Any]) -> str:
    """Return which row is the best, on what images, and its gain over the student alone."""
    if command == "search":
        return best_of_search(found)
    rows = [row for row in found["rows"] if not row["name"].startswith("mean of ")]
    best = max(rows, key=ranking_accuracy)
    if command == "sweep":
        names, what, base = short_names(found["keys"]), "settings", best["alone"]
        named = ", ".join(f"{names[key]} {value}" for key, value in best["settings"].items())
    else:
        what = "rows of the cohort" if command == "cohort" else "variants"
        named, base = best["name"], next((row for row in rows if row["name"] == "alone"), None)
    images = "test" if best["validation_mean"] is None else "validation"
    accuracy = f"{mean_std(best['accuracy_mean'], best['accuracy_std'])} % test {metric_of(best).title}"
    text = f"The best of {len(rows)} {what} on the {images} images is {named}: {accuracy}"
    if base is None or base is best:
        return f"{text}."
    gain = best["accuracy_mean"] - base["accuracy_mean"]
    interval = interval_text(Interval(**best["interval"]), signed=True) if best["interval"] else "unknown"
    return f"{text}, {gain:+.2f} points over the student alone (95 % interval {interval})."


def _recorded(run: Path, make: Callable[[str, Mapping[str, Any]], T]) -> Iterator[T]:
    """Yield what `make` returns for the records of a run's comparison, sweep, cohort and search."""
    for command in ("compare", "sweep", "cohort", "search"):
        path = run / command / RESULTS
        try:
            if found := read_json_file(path):
                yield make(command, found)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise RunError(f"{path} is damaged ({error!r}): run `kdpipe {command}` again.") from error
