"""Helpers for reporters: functions that take the progress events of a stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from kdpipe.stages.runtime.events import WARNING, ProgressEvent
from kdpipe.store.redact import redacted_json

Reporter = Callable[[ProgressEvent], None]


def is_last(event: ProgressEvent) -> bool:
    """Return whether a job is finished: training reports its last step again, with the metrics of the epoch."""
    return event.step == event.total and (bool(event.metrics) or event.unit != "step")


def to_all(*reporters: Reporter) -> Reporter:
    """Return one reporter that passes each event to several."""

    def report(event: ProgressEvent) -> None:
        for reporter in reporters:
            reporter(event)

    return report


class Throttle:
    """A filter that allows all warnings, a job's first and last event, and one every `every_s` seconds between."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last_allowed: dict[tuple[str, str], float] = {}

    def allow(self, event: ProgressEvent) -> bool:
        """Return whether to show the event."""
        if event.unit == WARNING:
            return True
        now = time.monotonic()
        last = self._last_allowed.get((event.stage, event.job))
        if last is None or is_last(event) or now - last >= self._every_s:
            self._last_allowed[event.stage, event.job] = now
            return True
        return False


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return strict JSON: non-finite numbers become null, unsupported values their text; URLs are redacted."""
    record = redacted_json(record)
    try:
        return json.dumps(record, allow_nan=False, default=str, indent=indent)
    except (ValueError, RecursionError):
        return json.dumps(_finite(record), allow_nan=False, default=str, indent=indent)


def _finite(value: Any, depth: int = 8) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping) and depth:
        return {str(name): _finite(item, depth - 1) for name, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_finite(item, depth - 1) for item in value]
    return value if isinstance(value, str | int | None) else str(value)[:200]
