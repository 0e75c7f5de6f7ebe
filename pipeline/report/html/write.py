"""`kdpipe report --html`: one or several runs as one HTML page that needs nothing but itself.

No script, no font, no picture from elsewhere: what a browser might fetch is forbidden by the page's own policy. The
same run folders give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.page.compare import comparison
from pipeline.page.confusions import confusions
from pipeline.page.curves import learning_curves
from pipeline.page.dark_knowledge import dark_knowledge
from pipeline.page.head import sentence, tiles
from pipeline.page.markup import Html, LeftOutError, element, join, safe
from pipeline.page.provenance import provenance
from pipeline.page.read import PageRun, read_run
from pipeline.page.reliability import reliability
from pipeline.page.style import STYLE
from pipeline.page.tables import result_tables
from pipeline.page.trade import trade
from store import KdpipeError, write_atomically

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def _samples(run: PageRun) -> Html:
    from pipeline.page.samples import samples  # torch and the data set: only here

    return samples(run)


@dataclass(frozen=True)
class Section:
    """A part of a run's page; key: the end of its anchor."""

    key: str
    title: str
    make: Callable[[PageRun], Html]


SECTIONS = (
    Section("results", "Results", result_tables),
    Section("curves", "Learning curves", learning_curves),
    Section("trade", "Accuracy, size and latency", trade),
    Section("reliability", "Confidence against accuracy", reliability),
    Section("confusions", "What they confuse", confusions),
    Section("similar", "What the teacher finds similar", dark_knowledge),
    Section("samples", "Pictures and opinions", _samples),
    Section("provenance", "Provenance", provenance),
)


def write_page(runs: Sequence[Path], file: Path, say: Callable[[str], None]) -> None:
    """Write the page of these run folders to `file`, in place of what is there; `say` is told of what is left out.

    Raises RunError where a folder is none, or its figures are damaged, and OSError where the page cannot be written.
    """
    found = [read_run(path, number) for number, path in enumerate(runs, 1)]
    content = page(found, say)
    write_atomically(file, content.encode())
    say(f"{file}: the page of {len(found)} {'run' if len(found) == 1 else 'runs'}, {len(content) / 1e6:.2f} MB.")


def page(runs: Sequence[PageRun], say: Callable[[str], None]) -> str:
    """The page's text."""
    title = runs[0].report.recipe if len(runs) == 1 else f"{len(runs)} runs"
    parts = [_run(runs[0], 2, say)] if len(runs) == 1 else [_together(runs, say), *(_run(one, 3, say) for one in runs)]
    head = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">',
        f"<title>{safe(title)}: kdpipe report</title><style>\n{STYLE}\n</style></head>\n<body><main>",
    ]
    return "\n".join([*head, *parts, "</main></body></html>\n"])


def _together(runs: Sequence[PageRun], say: Callable[[str], None]) -> Html:
    """The top of a page of several runs: their figures side by side."""
    body = element("section", _attempt(lambda: comparison(runs), "the comparison", say))
    links = (element("a", f"{run.report.recipe} ({run.folder_name})", href=f"#{run.key}top") for run in runs)
    return join(
        [element("p", "kdpipe report", kind="over"), element("h1", f"{len(runs)} runs"), element("nav", *links), body]
    )


def _run(run: PageRun, level: int, say: Callable[[str], None]) -> Html:
    """A run's part of the page, its sections under headings of `level`."""
    name = run.report.recipe
    over = element("p", f"kdpipe report, run folder {run.folder_name}", kind="over")
    links = (element("a", one.title, href=f"#{run.key}{one.key}") for one in SECTIONS)
    head = [over, element(f"h{level - 1}", name, id=f"{run.key}top"), element("p", sentence(run), kind="lead")]
    return element("section", *head, tiles(run), element("nav", *links), *_sections(run, level, say), kind="run")


def _sections(run: PageRun, level: int, say: Callable[[str], None]) -> Iterator[Html]:
    for one in SECTIONS:
        made = _attempt(partial(one.make, run), f"{run.report.recipe}: {one.title}", say, run)
        yield element("section", element(f"h{level}", one.title, id=run.key + one.key), made)


def _attempt(make: Callable[[], Html], what: str, say: Callable[[str], None], run: PageRun | None = None) -> Html:
    """A section, or the sentence that stands in its place: one that is damaged must not take the others along."""
    try:
        return make()
    except LeftOutError as error:
        why = str(error)
    except (KdpipeError, OSError) as error:
        why = f"This could not be read: {error}"
    except Exception as error:  # figures of any shape may stand in a stranger's files
        why = f"What this needs is damaged ({type(error).__name__}: {error})."
    why = run.discreet(why) if run else why
    say(f"{what} is left out: {why}")
    return element("p", why, kind="left-out")
