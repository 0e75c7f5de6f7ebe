"""Several runs on one page: the keys that differ, their results in one table, and their curves over each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdpipe.pipeline.report.chart import NETWORKS
from kdpipe.pipeline.report.formatting import integer, interval_text, kib, mean_std, share
from kdpipe.pipeline.report.html.read import MAIN_KINDS, PageRun
from kdpipe.pipeline.report.html.sections.curves import Curve, curve_panel, curves_of, legend
from kdpipe.pipeline.report.html.templating import link
from kdpipe.pipeline.terminal.tables import Table

HEADERS = (
    "run",
    "folder",
    "teacher %",
    "student alone %",
    "student distilled %",
    "points gained",
    "95 % interval",
    "gap closed",
    "parameters",
    "ONNX file",
)


LOOKS = tuple((shade, line) for line in ("solid", "dashed", "dotted") for shade in NETWORKS[1:])
"""Color and line style by run; used again where there are more runs."""

MAX_KEYS = 60
"""Recipe keys that are listed."""


def comparison(runs: Sequence[PageRun], num_detailed: int) -> dict[str, object]:
    """Return the table of all runs, and keys and curves of the first `num_detailed`, which have a part of their own."""
    rows = [_row(run, has_part=number < num_detailed) for number, run in enumerate(runs)]
    num_runs, runs = len(runs), runs[:num_detailed]
    keys = differing_keys(runs)
    names = [f"{run.report.recipe} ({run.folder_name})" for run in runs]
    settings = Table("Recipe keys that differ", ["key", *names], [[key, *values] for key, *values in keys[:MAX_KEYS]])
    titles = {network.kind: network.name for run in runs for network in run.main}
    panels = [(titles[kind], curves) for kind in MAIN_KINDS if (curves := _curves(runs, kind, names))]
    together = [curve for _, curves in panels for curve in curves]
    return {
        "settings": settings if keys else None,
        "num_left_out": max(len(keys) - MAX_KEYS, 0),
        "runs": Table("Comparison of runs", HEADERS, rows, num_names=2),
        "too_many": f"the first {len(runs):,} of these {num_runs:,} runs" if num_runs > len(runs) else "",
        "charts": [curve_panel(title, curves, together) for title, curves in panels],
        "legend": legend(together),
    }


def differing_keys(runs: Sequence[PageRun]) -> list[tuple[str, ...]]:
    """Return the recipe keys that are not the same in all runs, each with its values; "-" where a run has no such key.

    The name is left out, which heads the columns.
    """
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if key != "name")
    rows = ((key, *(recipe.get(key, "-") for recipe in flat)) for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of a recipe with their values as JSON; lists of tables are numbered."""
    if isinstance(value, Mapping):
        entries = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        entries = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return
    for name, inner in entries:
        yield from _flat(inner, f"{key}.{name}" if key else name)


def _curves(runs: Sequence[PageRun], kind: str, names: Sequence[str]) -> list[Curve]:
    """Return the curves of a kind of network, one of each run that has it."""
    looks = [(*LOOKS[number % len(LOOKS)], name) for number, name in enumerate(names)]
    found = [curves_of([network]) if (network := run.network(kind)) else [] for run in runs]
    return [
        replace(curve, name=name, color=shade, line=line)
        for (shade, line, name), own in zip(looks, found, strict=True)
        for curve in own
    ]


def _row(run: PageRun, *, has_part: bool) -> list[object]:
    gain, student = run.report.difference("student", "alone"), run.row("student")
    rows = [run.row(kind) for kind in MAIN_KINDS]
    return [
        link(f"{run.key}top", run.report.recipe) if has_part else run.report.recipe,
        run.folder_name,
        *(mean_std(row.accuracy_mean, row.accuracy_std) if row else "-" for row in rows),
        mean_std(gain.points, signed=True) if gain else "-",
        interval_text(gain.interval, signed=True) if gain else "-",
        share(run.report.verdict.share_closed),
        integer(student.num_parameters if student else None),
        kib(student.file_bytes if student else None),
    ]
