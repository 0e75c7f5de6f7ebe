"""Define the commands that look at run folders: report, status, clean and verify. Heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdpipe.pipeline.session.guard import guarded
from kdpipe.pipeline.session.options import AsJson
from kdpipe.pipeline.session.paths import output_path
from kdpipe.pipeline.terminal.output import print_info, print_result


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Several are compared.")],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            parser=output_path,
            help="The HTML file to write [default: report.html in the run folder].",
        ),
    ] = None,
    *,
    full: Annotated[bool, typer.Option("--full", help="Print all tables, and every network's file.")] = False,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; write a page only with --html.")
    ] = False,
) -> None:
    """Print the results of runs, and write a page of them. One self-contained HTML file with charts."""
    if html is not None and no_html:
        raise typer.BadParameter("--html and --no-html exclude each other.")
    with guarded():
        from kdpipe.pipeline.report.printing import page_path, print_reports

        page = page_path(runs, html) if html is not None or not (no_html or as_json) else None
        code = print_reports(runs, as_json, full=full, page=page)
        if page is not None:
            from kdpipe.pipeline.report.html.write import write_page

            write_page(runs, page, print_info)
        if code:
            raise typer.Exit(code)


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to search.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List all runs and stores below a folder. State, progress, rate, last activity, size and results."""
    with guarded():
        from kdpipe.pipeline.status.scan import read_status
        from kdpipe.pipeline.status.table import print_status

        found = read_status(folder)
        print_result(as_json, found.to_json(), lambda: print_status(found))


def clean(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of runs.")] = Path("runs"),
    *,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what no run needs, and what killed jobs left.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which runs use which stores, and what can be removed. Removes nothing without --remove."""
    with guarded():
        from kdpipe.pipeline.status import clean as command

        found = command.clean(folder, remove=remove)
        print_result(as_json, command.clean_json(folder, found), lambda: command.print_clean(folder, found))


def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder; a store is checked as well.")],
    as_json: AsJson = False,
) -> None:
    """Check every file of a run, and its stores. Exit status 1 if anything is damaged, 3 if units are only missing."""
    with guarded():
        from kdpipe.pipeline.commands import verify as command

        verdict = command.verify(folder, as_json)
        print_result(
            as_json, {"path": str(folder), **verdict.to_json()}, lambda: command.print_verdict(folder, verdict)
        )
        command.exit_for(verdict)
