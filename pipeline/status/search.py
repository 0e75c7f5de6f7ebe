"""Read the untrusted record of a search: the numbers of its trials, and what its winner reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdpipe.pipeline.status.files import number
from kdpipe.store.fs.checksums import read_intact_json

SEARCH = "search"
"""The command, and the folder of its record in a run."""

TRIAL_STATES = ("complete", "pruned", "fail", "running", "waiting")


def best_of_search(folder: Path) -> float | None:
    """Return the mean test accuracy of a search's winner in percent; the record is untrusted."""
    final = (read_intact_json(folder / SEARCH / "results.json") or {}).get("final")
    rows = final.get("rows") if isinstance(final, dict) else None
    best = (
        [row for row in rows if isinstance(row, dict) and row.get("name") == "best"] if isinstance(rows, list) else []
    )
    accuracy = best[0].get("accuracy_mean") if best else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 100 else None


def trials_of_search(folder: Path) -> dict[str, int]:
    """Return the numbers of trials by state, as the untrusted record of a search has them."""
    record = read_intact_json(folder / SEARCH / "results.json") or {}
    counts = record.get("counts")
    found: dict[str, Any] = {state: counts.get(state) for state in TRIAL_STATES} if isinstance(counts, dict) else {}
    found |= {"planned": record.get("num_trials"), "best": record.get("best")}
    return {name: count for name, value in found.items() if (count := number(value)) is not None}
