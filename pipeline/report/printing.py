"""Print the results of runs: what was gained, the main networks and where the files are, or all tables."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.text import Text

from kdpipe.pipeline.report.formatting import integer, kib, mean_std, size_ratio
from kdpipe.pipeline.report.html.read import MAIN_KINDS, PageRun, read_run, recommended
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report, Row
from kdpipe.pipeline.report.tables import report_tables
from kdpipe.pipeline.report.variants import recorded_tables
from kdpipe.pipeline.session.paths import require_writable
from kdpipe.pipeline.terminal.exit_codes import DONE, DONE_IN_PART
from kdpipe.pipeline.terminal.output import console, print_json
from kdpipe.pipeline.terminal.tables import Table, print_short_table, print_table


def print_reports(runs: Sequence[Path], as_json: bool, *, full: bool = False, page: Path | None = None) -> int:
    """Print the reports of runs and return the exit status: 3 if any of their jobs are unfinished.

    Args:
        runs: The run folders.
        as_json: Whether to print JSON, which has everything.
        full: Whether to print all tables.
        page: The HTML page that is written too.

    Raises:
        RunError: Before anything is printed, as `read_report` does.
    """
    if full or as_json:
        reports = [read_report(run) for run in runs]
    else:
        page_runs = [read_run(run, number) for number, run in enumerate(runs, 1)]
        reports = [run.report for run in page_runs]
    if as_json:
        documents = [report.to_json() for report in reports]
        print_json(documents[0] if len(documents) == 1 else {"reports": documents})
    elif full:
        for report in reports:
            print_report(report)
    else:
        for run in page_runs:
            print_short(run, page)
    return DONE_IN_PART if any(report.missing for report in reports) else DONE


def page_path(runs: Sequence[Path], file: Path | None) -> Path:
    """Return the page's path: `file`, or report.html in the only run's folder, or in the current one.

    A run folder that may only be read, such as a colleague's, has its page in the current folder, with its name.

    Raises:
        RunError: If no file can be written there.
    """
    path = file or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if file is None and path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        path = Path(f"report-{path.parent.resolve().name}.html")
    if file is not None or path.parent.is_dir():
        require_writable(path, "--html")
    return path


def print_report(report: Report) -> None:
    """Print all tables and the paths of the files to stdout."""
    screen, variants = console(), list(recorded_tables(Path(report.run), report.recipe))
    screen.print(report.recipe, style="bold")
    screen.print(Text(_wrapped(report.verdict.text, screen.width)))
    for table in (*report_tables(report), *variants):
        print_table(screen, table)
    screen.print("Files:", style="bold")
    files = [(row.name, row.files[0]) for row in report.rows if row.files]
    files += [("Pareto plot", report.pareto)] if report.pareto else []
    files += [("artifacts", folder) for folder in report.artifacts]
    for name, path in files:
        screen.print(f"  {name:<18} {path}", soft_wrap=True)
    if report.missing:
        screen.print(f"Not finished: {', '.join(report.missing)}. Run the recipe again to complete it.", soft_wrap=True)


def print_short(run: PageRun, page: Path | None) -> None:
    """Print the result to stdout; `page` is the HTML page that is written too."""
    screen = console()
    screen.print(Text(run.report.recipe, style="bold"))
    screen.print(Text(_wrapped(run.report.verdict.text, screen.width)))
    best = recommended(run)
    if rows := list(_main_rows(run, best)):
        cells = [
            [
                row.name,
                mean_std(row.accuracy_mean, row.accuracy_std),
                f"{row.interval.low:.1f}–{row.interval.high:.1f}" if row.interval else "-",
                kib(row.file_bytes),
                size_ratio(row.of_teacher),
                integer(row.num_parameters),
            ]
            for row in rows
        ]
        headers = ["network", f"{rows[0].tested} %", "95 % interval", "ONNX file", "size / teacher's", "parameters"]
        print_short_table(screen, Table("", headers, cells), full_report(run.path))
    for name, text in _places(run, best, page):
        screen.print(Text(f"{name:<8} {text}"), soft_wrap=True)


def full_report(run: Path) -> str:
    """Return the command that prints all tables of a run."""
    return f"kdpipe report --full {shlex.quote(str(run))}"


def _wrapped(text: str, width: int) -> str:
    """Break a sentence into lines, but not before a percent sign or around a ±."""
    joined = text.replace(" %", "\xa0%").replace(" ± ", "\xa0±\xa0")
    return textwrap.fill(joined, max(width, 1), break_on_hyphens=False).replace("\xa0", " ")


def _main_rows(run: PageRun, best: tuple[str, Path] | None) -> Iterator[Row]:
    """Yield the teacher, the students, and the recommended or else smallest of the compressed networks."""
    yield from (row for kind in MAIN_KINDS if (row := run.row(kind)))
    compressed = [row for row in run.report.rows if row.kind not in MAIN_KINDS and row.kind == row.timed_as]
    small = min(compressed, key=lambda row: (not best or row.kind != best[0], row.file_bytes or 0), default=None)
    if small is not None:
        yield small


def _places(run: PageRun, best: tuple[str, Path] | None, page: Path | None) -> Iterator[tuple[str, str]]:
    """Yield where the files and the page are, and what is missing."""
    folder = shlex.quote(str(run.path))
    yield "files", str(run.path)
    if best is not None:
        name = next((row.name for row in run.report.rows if row.kind == best[0]), best[0])
        yield "deploy", f"{best[1]} (recommended: {name})"
        yield "try", f"python {shlex.quote(str(best[1] / 'predict.py'))} IMAGE"
        yield "next", f"kdpipe bench {shlex.quote(str(best[1] / 'model.onnx'))}"
    yield "page", str(page) if page else f"kdpipe report {folder}"
    yield "tables", full_report(run.path)
    if run.report.missing:
        yield "missing", f"{', '.join(run.report.missing)}: run the recipe again to complete them"
