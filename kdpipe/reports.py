"""Check stores, and read the results of run folders."""

from __future__ import annotations

from pathlib import Path

from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report
from kdpipe.store import TargetStore
from kdpipe.store.check.verify import VerifyReport, verify_store


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


def verify(store: TargetStore | str | Path) -> VerifyReport:
    """Verify every byte of a store: metadata, samples, markers and shards.

    Args:
        store: An opened store, or its folder.

    Returns:
        All faults in `damaged`, unfinished units in `missing`; `ok` if there are none.

    Raises:
        StoreError: There is no store.
    """
    return verify_store(store.path if isinstance(store, TargetStore) else Path(store).expanduser())
