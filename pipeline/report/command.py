"""`kdpipe report`, and the end of `kdpipe run`: the tables of runs on stdout, and their page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.report.report import Report, print_report, read_report
from pipeline.session.paths import require_writable
from pipeline.terminal.exit_codes import DONE, DONE_IN_PART
from pipeline.terminal.output import print_info, print_json


def tell_report(runs: Sequence[Path], as_json: bool) -> int:
    """The tables of runs; the exit status, 3 where something of them is still to be done. Raises what `read_report`
    raises, before anything is printed.
    """
    made = [read_report(run) for run in runs]
    if as_json:
        print_json(_document(made))
    else:
        for one in made:
            print_report(one)
    return DONE_IN_PART if any(one.missing for one in made) else DONE


def _document(made: Sequence[Report]) -> dict[str, object]:
    return made[0].to_json() if len(made) == 1 else {"reports": [one.to_json() for one in made]}


def page_place(runs: Sequence[Path], file: Path | None) -> Path:
    """Where the page goes: `file`, else of one run into its folder, of several into the current one.

    Raises RunError where a file cannot be written there. A run that is none is for `read_report` to refuse.
    """
    place = file or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if file is not None or place.parent.is_dir():
        require_writable(place, "--html")
    return place


def write_report(runs: Sequence[Path], file: Path) -> None:
    """The page of the runs, into `file`."""
    from pipeline.page.write import write_page

    write_page(runs, file, print_info)
