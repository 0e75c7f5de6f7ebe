"""The section on what the teacher finds similar: the heat map, the closest pairs, and each class's neighbours."""

from __future__ import annotations

import numpy as np

from pipeline.page.heat import heat_map, legend, percent
from pipeline.page.markup import Html, LeftOutError, details, element, figure, join, note, table
from pipeline.page.read import PageRun
from pipeline.page.similarity import TEMPERATURE, Similarity, by_likeness, closest_pairs, read_similarity
from store import StoreError

MOST_DRAWN, MOST_IN_OWN_ORDER, MOST_BESIDE = 100, 12, 30
"""So many classes are drawn; with up to so many they keep the data set's order, which people know;
and of so many the map leaves room for a table beside it."""


def dark_knowledge(run: PageRun) -> Html:
    """The section. Raises LeftOutError where nothing that the teacher said can be read."""
    try:
        found = read_similarity(run.path, run.recipe)
    except StoreError as error:
        raise LeftOutError(f"What the teacher says could not be read: {error}") from error
    count = len(found.names)
    drawn = np.arange(count) if count <= MOST_IN_OWN_ORDER else by_likeness(found, MOST_DRAWN)
    values = found.others[np.ix_(drawn, drawn)]
    if count < 2 or not np.isfinite(values).any():
        raise LeftOutError("There are not two classes that the teacher could find similar.")
    ends, names = (float(np.nanmin(values)), float(np.nanmax(values))), [found.names[at] for at in drawn]
    title = f"{run.report.recipe}: what the teacher finds similar"
    desc = "rows: what an image shows; columns: the class that gets a share of the teacher's softened answer"
    heat = heat_map(title, desc, values, names, percent, ends=ends)
    drawing = figure(_caption(len(drawn), count, ends), heat, kind="map")
    return join(
        [
            _explained(found),
            element("div", drawing, _pairs(found), kind="beside" if len(drawn) <= MOST_BESIDE else "below"),
            details("The figures as a table", _matrix(found) if count <= MOST_IN_OWN_ORDER else _neighbours(found)),
        ]
    )


def _explained(found: Similarity) -> Html:
    return note(
        f"A teacher's wrong answers are not all equally wrong, and that is what a student learns from it. Mean over "
        f"{found.num_samples:,} samples, {found.source}, of softmax(logits / {TEMPERATURE:g})."
    )


def _caption(num_drawn: int, num_classes: int, ends: tuple[float, float]) -> Html:
    text = "A row is what the image shows, a column the other class that gets a share of the answer. "
    if num_classes > MOST_IN_OWN_ORDER:
        text += "Classes stand beside those that they resemble. "
    if num_drawn < num_classes:
        text += f"Drawn are the {num_drawn} of {num_classes} classes that most resemble another. "
    return join([text, legend(ends, percent)])


def _pairs(found: Similarity) -> Html:
    cells = (
        [found.names[one], found.names[other], percent(found.shares[one, other]), percent(found.shares[other, one])]
        for one, other in closest_pairs(found, 12)
    )
    headers = ["one", "the other", "the other's share on images of the one", "and the other way"]
    return table("The most similar pairs", headers, cells, num_names=2)


def _matrix(found: Similarity) -> Html:
    cells = ([name, *map(percent, row)] for name, row in zip(found.names, found.shares, strict=True))
    return table("Mean softened answer, by what the image shows", ["the image shows", *found.names], cells)


def _neighbours(found: Similarity) -> Html:
    """For each class the three that get most of its answer."""
    lines: list[list[object]] = []
    for at, name in enumerate(found.names):
        row = found.others[at]
        if np.isnan(found.shares[at]).any():
            continue
        near = np.argsort(-np.nan_to_num(row, nan=-1.0), kind="stable")[:3]
        lines.append(
            [name, percent(found.shares[at, at]), *(f"{found.names[one]} {percent(row[one])}" for one in near)]
        )
    headers = ["the image shows", "its own share", "next", "second", "third"]
    return table("Whom the teacher thinks of besides", headers, lines)
