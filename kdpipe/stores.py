"""Target stores from Python: open and verify them."""

from __future__ import annotations

from pathlib import Path

from kdpipe.store import TargetStore
from kdpipe.store.check.verify import VerifyReport, verify_store


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
