"""Write one or several runs as one self-contained HTML file.

It has no script, font or image from elsewhere; its content security policy forbids fetching any. The same run folders
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdpipe.pipeline.report.chart import with_unique_ids
from kdpipe.pipeline.report.html.read import PageRun, read_run
from kdpipe.pipeline.report.html.sections.compare import comparison
from kdpipe.pipeline.report.html.sections.confusions import confusions
from kdpipe.pipeline.report.html.sections.curves import learning_curves
from kdpipe.pipeline.report.html.sections.facts import facts
from kdpipe.pipeline.report.html.sections.labels import average_precision, has_labels
from kdpipe.pipeline.report.html.sections.losses import losses
from kdpipe.pipeline.report.html.sections.provenance import provenance
from kdpipe.pipeline.report.html.sections.reliability import reliability
from kdpipe.pipeline.report.html.sections.search import has_search, search
from kdpipe.pipeline.report.html.sections.similarity import class_similarity
from kdpipe.pipeline.report.html.sections.summary import summary
from kdpipe.pipeline.report.html.sections.tables import has_variants, results, tradeoff, variants
from kdpipe.pipeline.report.html.templating import LeftOutError, render
from kdpipe.store import KdpipeError, write_atomically

Context = Mapping[str, object]
Message = Callable[[str], None]


def _samples(run: PageRun) -> Context:
    from kdpipe.pipeline.report.html.sections.samples import samples  # imports torch

    return samples(run)


@dataclass(frozen=True)
class Section:
    """A part of a run's page: `key`.html is its template, filled with the values that `make` returns.

    `belongs` tells whether a run's page has it.
    """

    key: str
    title: str
    make: Callable[[PageRun], Context]
    belongs: Callable[[PageRun], bool] = lambda run: True


SECTIONS = (
    Section("results", "Results", results),
    Section("variants", "Variants and settings", variants, has_variants),
    Section("search", "Course of the search", search, has_search),
    Section("curves", "Learning curves", learning_curves),
    Section("losses", "Losses by epoch", losses),
    Section("tradeoff", "Accuracy, size and latency", tradeoff),
    Section("labels", "Average precision of each label", average_precision, has_labels),
    Section("reliability", "Reliability", reliability),
    Section("confusions", "Confusions", confusions),
    Section("similarity", "Class similarity", class_similarity),
    Section("samples", "Test images with predictions", _samples),
    Section("provenance", "Provenance", provenance),
)

MAX_BYTES = 1_000_000

MAX_DETAILED = 20
"""Runs that have a part of their own, keys and curves on a page; the table of runs has them all."""

FIRST_LEFT_OUT = (
    "samples",
    "similarity",
    "confusions",
    "labels",
    "losses",
    "reliability",
    "tradeoff",
    "curves",
    "search",
    "variants",
    "provenance",
)
"""The sections that a page above MAX_BYTES leaves out, in this order, in all of its runs."""


def write_page(runs: Sequence[Path], file: Path, on_message: Message) -> None:
    """Write the page of run folders to `file`, replacing it.

    Args:
        runs: Run folders, each shown in a part of its own.
        file: Path of the page.
        on_message: Called with a sentence for each section that is left out, and at the end.

    Raises:
        RunError: If a folder is not a run folder, or its results are damaged.
        OSError: If the page cannot be written.
    """
    found = [read_run(path, number) for number, path in enumerate(runs, 1)]
    content = page(found, on_message)
    write_atomically(file, content.encode())
    num_runs = f"{len(found)} {'run' if len(found) == 1 else 'runs'}"
    on_message(f"{file}: the page of {num_runs}, {len(content) / 1e6:.2f} MB.")


def page(runs: Sequence[PageRun], on_message: Message) -> str:
    """Return the page's text."""
    title, together = runs[0].report.recipe, None
    if len(runs) > 1:
        title = f"{len(runs)} runs"
        together = _attempt("compare.html", lambda: comparison(runs, MAX_DETAILED), "the comparison", on_message)
    if len(runs) > MAX_DETAILED:
        on_message(f"the page has all {len(runs):,} runs in a table, and details of the first {MAX_DETAILED} only.")
    parts = [
        {
            "run": run,
            "summary": render("summary.html", **summary(run)),
            "facts": _attempt("facts.html", partial(facts, run), f"{run.report.recipe}: what it is", on_message, run),
            "sections": _sections(run, on_message),
        }
        for run in runs[:MAX_DETAILED]
    ]
    draw = partial(render, "page.html", title=title, comparison=together, parts=parts)
    return _fitted(parts, lambda: with_unique_ids(draw()), on_message)


def _fitted(parts: Sequence[Mapping[str, Any]], draw: Callable[[], str], on_message: Message) -> str:
    """Return the page that `draw` makes of the parts; sections are left out until it has MAX_BYTES."""
    text, left_out = draw(), []
    for key in FIRST_LEFT_OUT:
        if len(text.encode()) <= MAX_BYTES:
            break
        found = [section for part in parts for section in part["sections"] if section["key"] == key]
        for section in found:
            reason = f"The page would have more than {MAX_BYTES // 10**6} MB: the page of this run alone may have it."
            section["body"] = render("left_out.html", reason=reason)
        left_out += [section["title"] for section in found[:1]]
        text = draw()
    if left_out:
        on_message(f"{', '.join(left_out)}: left out, the page would have more than {MAX_BYTES // 10**6} MB.")
    return text


def _sections(run: PageRun, on_message: Message) -> list[dict[str, object]]:
    def body(section: Section) -> Markup:
        name = f"{run.report.recipe}: {section.title}"
        return _attempt(f"{section.key}.html", partial(section.make, run), name, on_message, run)

    return [
        {"key": section.key, "title": section.title, "body": body(section)}
        for section in SECTIONS
        if section.belongs(run)
    ]


def _attempt(
    template: str, make: Callable[[], Context], name: str, on_message: Message, run: PageRun | None = None
) -> Markup:
    """Render a section, or why it is left out: a damaged one does not affect the others."""
    try:
        return render(template, **make())
    except LeftOutError as error:
        reason = str(error)
    except (KdpipeError, OSError) as error:
        reason = f"This could not be read: {error}"
    except Exception as error:  # files of a run folder are untrusted input
        reason = f"The data of this section is damaged ({type(error).__name__}: {error})."
    reason = run.without_path(reason) if run else reason
    on_message(f"{name} is left out: {reason}")
    return render("left_out.html", reason=reason)
