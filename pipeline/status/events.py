"""Read the end of a run's events.jsonl: where the last job is, its rate, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

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

    @property
    def process(self) -> tuple[str, int]:
        return self.host, self.pid


def read_events(run: Path) -> list[LoggedEvent]:
    """Return the last events of a run folder, oldest first; incomplete and invalid lines are skipped."""
    return list(_parse(read_tail(run / EVENTS, TAIL_BYTES)))


def _parse(raw_lines: Sequence[bytes]) -> Iterator[LoggedEvent]:
    for raw in raw_lines:
        try:
            record = json.loads(raw)
            time = datetime.fromisoformat(record["time"]).timestamp()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
            continue
        yield _event(time, record)


def _event(time: float, record: dict[str, Any]) -> LoggedEvent:
    texts = {name: text(record.get(name)) for name in ("kind", "command", "host", "stage", "job", "unit")}
    code = record.get("exit_code")
    return LoggedEvent(
        time=time,
        pid=number(record.get("pid")) or 0,
        exit_code=code if type(code) is int and abs(code) < 1000 else None,
        step=number(record.get("step")) or 0,
        total=number(record.get("total")) or 0,
        **texts,
    )


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run's last process. `current` is its last progress event; `rate_per_s` is in units a second."""

    command: str
    host: str
    pid: int
    last_event_at: float
    exit_code: int | None
    has_ended: bool
    current: LoggedEvent | None
    rate_per_s: float | None


def progress_of(events: Sequence[LoggedEvent]) -> RunProgress | None:
    """Return the progress of the process with the last event; None without events."""
    if not events:
        return None
    last = events[-1]
    own = [event for event in events if event.kind == "progress" and event.process == last.process and event.total > 0]
    current = own[-1] if own else None
    job = [event for event in own if current and (event.stage, event.job) == (current.stage, current.job)]
    return RunProgress(
        command=last.command,
        host=last.host,
        pid=last.pid,
        last_event_at=last.time,
        exit_code=last.exit_code if last.kind == "end" else None,
        has_ended=last.kind == "end",
        current=current,
        rate_per_s=_rate(job),
    )


def _rate(events: Sequence[LoggedEvent]) -> float | None:
    """Return the rate of the last ten minutes."""
    recent = [event for event in events if events[-1].time - event.time <= RATE_WINDOW_S]
    steps = recent[-1].step - recent[0].step if recent else 0
    elapsed_s = recent[-1].time - recent[0].time if recent else 0.0
    return steps / elapsed_s if steps > 0 and elapsed_s > 0 else None
