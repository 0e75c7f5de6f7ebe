"""Confusions: which classes the networks take for which, the teacher beside the student alone and distilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.page.heat import heat_map, legend
from pipeline.page.markup import Html, LeftOutError, details, figure, join, note, table
from pipeline.page.read import Network, PageRun

MOST_DRAWN = 20
"""With more classes, a matrix of confusions is mostly empty: the pairs are listed alone."""

FIRST, MOST_LISTED = 12, 200


@dataclass(frozen=True)
class Confused:
    """Of a network, how often a class [label] was taken for another [answer], a test set, mean over the seeds."""

    name: str
    pairs: Mapping[tuple[int, int], float]


def confused_of(network: Network) -> Confused | None:
    """None where it was not kept."""
    held = [job.examined["confusions"] for job in network.done if job.examined and "confusions" in job.examined]
    if not held:
        return None
    pairs: dict[tuple[int, int], float] = {}
    for one in held:
        for label, answer, count in one:
            pairs[int(label), int(answer)] = pairs.get((int(label), int(answer)), 0.0) + int(count) / len(held)
    return Confused(network.name, pairs)


def class_names(run: PageRun) -> list[str]:
    """As the jobs' figures name them."""
    rows = [row.per_class for row in run.report.rows if row.per_class]
    return [one.name for one in rows[0]] if rows else []


def confusions(run: PageRun) -> Html:
    """The section."""
    found = [one for network in run.main if (one := confused_of(network)) is not None]
    names = class_names(run)
    if not found or not names:
        raise LeftOutError("Which classes are confused was not kept by the kdpipe that made this run.")
    listed = _listed(found)
    if not listed:
        return note("Not one test image is answered wrongly.")
    drawn = _matrices(found, names) if len(names) <= MOST_DRAWN else ""
    head = ["the image shows", "the answer is", *(one.name for one in found)]
    cells = [
        [names[label], names[answer], *(f"{one.pairs.get((label, answer), 0):.1f}" for one in found)]
        for label, answer in listed
    ]
    caption = "The most frequent confusions, in test images, mean over the seeds"
    rest = (
        details(f"The next {len(cells) - FIRST}", table(caption, head, cells[FIRST:], num_names=2))
        if len(cells) > FIRST
        else ""
    )
    return join([drawn, table(caption, head, cells[:FIRST], num_names=2), rest])


def _listed(found: Sequence[Confused]) -> list[tuple[int, int]]:
    """All pairs, those first of which there are most in all networks together."""
    together: dict[tuple[int, int], float] = {}
    for one in found:
        for pair, count in one.pairs.items():
            together[pair] = together.get(pair, 0.0) + count
    return sorted(together, key=lambda pair: (-round(together[pair], 9), pair))[:MOST_LISTED]


def _matrices(found: Sequence[Confused], names: Sequence[str]) -> Html:
    most = max(max(one.pairs.values(), default=0.0) for one in found)
    maps = []
    for one in found:
        values = np.zeros((len(names), len(names)))
        np.fill_diagonal(values, np.nan)
        for (label, answer), count in one.pairs.items():
            values[label, answer] = count
        total = f"{sum(one.pairs.values()):.1f} wrong answers"
        shown = heat_map(
            f"{one.name}: {total}",
            "rows: what an image shows; columns: the answer",
            values,
            names,
            _count,
            ends=(0.0, most),
        )
        maps.append(join([Html("<div>"), note(f"{one.name}: {total}"), shown, Html("</div>")]))
    caption = join(
        [
            "A row is what an image shows, a column the wrong answer; in test images, mean over the seeds. ",
            legend((0.0, most), _count),
        ]
    )
    return figure(caption, *maps)


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or value == round(value) else f"{value:.1f}"
