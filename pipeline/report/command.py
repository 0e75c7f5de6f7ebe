"""Run `kdpipe report`: print the tables of runs and write their HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdpipe.pipeline.report.report import print_report, read_report
from kdpipe.pipeline.session.paths import require_writable
from kdpipe.pipeline.terminal.exit_codes import DONE, DONE_IN_PART
from kdpipe.pipeline.terminal.output import print_info, print_json


def print_reports(runs: Sequence[Path], as_json: bool) -> int:
    """Print the reports of runs and return the exit status: 3 if any of their jobs are unfinished.

    Raises:
        RunError: Before anything is printed, as `read_report` does.
    """
    reports = [read_report(run) for run in runs]
    if as_json:
        documents = [report.to_json() for report in reports]
        print_json(documents[0] if len(documents) == 1 else {"reports": documents})
    else:
        for report in reports:
            print_report(report)
    return DONE_IN_PART if any(report.missing for report in reports) else DONE


def page_path(runs: Sequence[Path], file: Path | None) -> Path:
    """Return the page's path: `file`, or report.html in the only run's folder, or in the current one.

    Raises:
        RunError: If no file can be written there.
    """
    place = file or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if file is not None or place.parent.is_dir():
        require_writable(place, "--html")
    return place


def write_html_report(runs: Sequence[Path], file: Path) -> None:
    """Write the HTML page of the runs to `file`."""
    from kdpipe.pipeline.report.html.write import write_page

    write_page(runs, file, print_info)
