"""Save figures as empty charts: drawing them takes most of the time of a report's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMPTY = '<svg viewBox="0 0 1 1"></svg>'


def save_empty(_: Any, target: Any, **settings: Any) -> None:
    """Stand in for `matplotlib.figure.Figure.savefig`."""
    if hasattr(target, "write"):
        target.write(EMPTY)
    else:
        Path(target).write_text(EMPTY)
