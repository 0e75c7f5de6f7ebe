"""Reports of run folders from Python."""

from __future__ import annotations

from pathlib import Path

from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report


def report(run: str | Path, *, html: str | Path | None = None) -> Report:
    """Read the results of a run folder, and write them as an HTML page if asked to.

    Args:
        run: The run folder, of the command line or of `train_student`.
        html: Where to write the page, one file without scripts.

    Returns:
        The rows of the tables: accuracy, size, latency and agreement of each network.

    Raises:
        RunError: It is not a run folder, or its results are damaged.
    """
    folder = Path(run).expanduser()
    found = read_report(folder)
    if html is not None:
        from kdpipe.pipeline.report.html.write import write_page

        write_page([folder], Path(html).expanduser(), lambda message: None)
    return found
