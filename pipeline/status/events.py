"""Read the end of a run's events.jsonl: where the last job is, its rate, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kdpipe.pipeline.session.event_log import EVENTS
from kdpipe.pipeline.status.files import number, read_tail, text

TAIL_BYTES = 64 * 1024
RATE_WINDOW_S = 600.0


@dataclass(frozen=True)
class LoggedEvent:
    """One checked line of an untrusted events.jsonl. `time` is in seconds since 1970."""

    time: float
    kind: str
    command: str
    host: str
    pid: int
    exit_code: int | None
    stage: str
    job: str
    step: int
    total: int
    unit: str


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run's last process: its last event, its last progress event, and the rate in units a second."""

    last: LoggedEvent
    current: LoggedEvent | None
    rate_per_s: float | None

    @property
    def has_ended(self) -> bool:
        return self.last.kind == "end"


def read_progress(run: Path) -> RunProgress | None:
    """Return the progress of the process that wrote the last event in a run folder; None without events."""
    events = [event for raw in read_tail(run / EVENTS, TAIL_BYTES) if (event := _parse(raw))]
    if not events:
        return None
    last = events[-1]
    own = [event for event in events if (event.host, event.pid) == (last.host, last.pid)]
    own = [event for event in own if event.kind == "progress" and event.total > 0]
    current = own[-1] if own else None
    job = [event for event in own if current and (event.stage, event.job) == (current.stage, current.job)]
    return RunProgress(last, current, _rate(job))


def _parse(raw: bytes) -> LoggedEvent | None:
    """Return the event of a line; None if it is incomplete or invalid."""
    try:
        record = json.loads(raw)
        time = datetime.fromisoformat(record["time"]).timestamp()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
        return None
    texts = {name: text(record.get(name)) for name in ("kind", "command", "host", "stage", "job", "unit")}
    counts = {name: number(record.get(name)) or 0 for name in ("pid", "step", "total")}
    code = record.get("exit_code")
    return LoggedEvent(time=time, exit_code=code if type(code) is int and abs(code) < 1000 else None, **texts, **counts)


def _rate(events: Sequence[LoggedEvent]) -> float | None:
    """Return the rate of the last ten minutes."""
    recent = [event for event in events if events[-1].time - event.time <= RATE_WINDOW_S]
    steps = recent[-1].step - recent[0].step if recent else 0
    elapsed_s = recent[-1].time - recent[0].time if recent else 0.0
    return steps / elapsed_s if steps > 0 and elapsed_s > 0 else None
