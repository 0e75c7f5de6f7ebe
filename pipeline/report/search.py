"""The tables of `kdpipe search`, on the terminal and on the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kdpipe.pipeline.recipe.sweep import short_names
from kdpipe.pipeline.report.formatting import interval_text, mean_std, num_seeds
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.evaluation.intervals import Interval
from kdpipe.stages.evaluation.main_metric import metric_of

MAX_TRIALS = 20
"""Trials that the table lists; the record has all."""

NAMES = {"best": "the search's best", "one-epoch": "best of {kept} after one epoch", "recipe": "the recipe"}


def search_tables(recipe: str, found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of a search: the winner's, if it is finished, and the trials'."""
    if "final" in found:
        yield final_table(recipe, found)
    yield trials_table(recipe, found)


def best_of_search(found: Mapping[str, Any]) -> str:
    """Return in a sentence what a search found; nothing before it is finished."""
    if "final" not in found:
        return ""
    rows = {row["name"]: row for row in found["final"]["rows"]}
    best, base = rows["best"], rows.get("recipe")
    settings = found["trials"][found["final"]["winner"]]["settings"]
    names = short_names(found["keys"])
    named = ", ".join(f"{names[key]} {value_text(value)}" for key, value in settings.items())
    text = f"The best of {counts_text(found)} on the validation images is {named}: "
    text += f"{mean_std(best['accuracy_mean'], best['accuracy_std'])} % test {metric_of(best).title}"
    if base is None:
        return f"{text}."
    gain = best["accuracy_mean"] - base["accuracy_mean"]
    interval = interval_text(Interval(**best["interval"]), signed=True) if best["interval"] else "unknown"
    return f"{text}, {gain:+.2f} points over the recipe as it is (95 % interval {interval})."


def final_table(recipe: str, found: Mapping[str, Any]) -> Table:
    """Return the table of the winner beside what it is compared with, over the recipe's seeds."""
    final = found["final"]
    rows = final["rows"]
    headers = ["student", f"test {metric_of(rows[0]).title} %", "over the recipe", "its 95 % interval", "validation %"]
    others = found["objectives"][1:]
    headers += ["agreement %", *others, "epochs to find it"]
    base = next((row["accuracy_mean"] for row in rows if row["name"] == "recipe"), None)
    cells = [
        [
            NAMES.get(row["name"], row["name"]).format(kept=len(final["kept"])),
            mean_std(row["accuracy_mean"], row["accuracy_std"]),
            "-" if base is None or row["name"] == "recipe" else f"{row['accuracy_mean'] - base:+.2f}",
            interval_text(Interval(**row["interval"]) if row["interval"] else None, signed=True),
            mean_std(row["validation_mean"]),
            mean_std(row["agreement_mean"]),
            *(_objective_text(name, row["objectives"][name]) for name in others),
            f"{final['num_epochs'].get(row['name'], 0):,}",
        ]
        for row in rows
    ]
    most = max(len(row["accuracies"]) for row in rows)
    return Table(f"{recipe}: what {counts_text(found)} found, over {num_seeds(most)}", headers, cells)


def trials_table(recipe: str, found: Mapping[str, Any]) -> Table:
    """Return the table of the best trials: those that were completed first, then by what they reached."""
    names, done = short_names(found["keys"]), [one for one in found["trials"] if one["values"]]
    ranked = sorted(done, key=lambda one: (one["state"] != "complete", -one["values"][0], one["number"]))[:MAX_TRIALS]
    first, *others = found["objectives"]
    headers = ["trial", *names.values(), f"validation {first} %", *others, "epochs", "state"]
    cells = [
        [
            str(one["number"]),
            *(value_text(one["settings"].get(key)) for key in names),
            f"{100 * one['values'][0]:.2f}",
            *map(_objective_text, others, one["values"][1:]),
            str(one["num_epochs"]),
            "on the front" if others and one["number"] in found["front"] else one["state"],
        ]
        for one in ranked
    ]
    caption = f"{recipe}: {counts_text(found)}"
    caption += f"; the best {MAX_TRIALS}" if len(done) > MAX_TRIALS else ""
    return Table(caption, headers, cells, num_names=1 + len(names))


def counts_text(found: Mapping[str, Any]) -> str:
    """Return the numbers of trials, such as "30 trials (12 complete, 18 pruned)"."""
    states = ("complete", "pruned", "fail", "running", "waiting")
    counts = {state: found["counts"].get(state, 0) for state in states}
    parts = [f"{count:,} {'failed' if state == 'fail' else state}" for state, count in counts.items() if count]
    return f"{found['num_trials']:,} trials ({', '.join(parts) or 'none yet'})"


def _objective_text(name: str, value: float) -> str:
    """Return a value of an objective beside accuracy: a share for latency, else a count."""
    return f"{value:.3f}" if name == "latency" else f"{value:,.0f}"


def value_text(value: Any) -> str:
    """Return a setting as a short text; empty where a trial does not have it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
