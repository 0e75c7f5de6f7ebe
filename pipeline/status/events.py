"""What the end of a run's events.jsonl says: where the last job stands, how fast it goes, how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.session.event_log import EVENTS
from pipeline.status.files import number, read_tail, text

TAIL_BYTES = 64 * 1024
RATE_WINDOW_S = 600.0
"""The rate is that of the last ten minutes."""


@dataclass(frozen=True)
class Line:
    """One event, of a file that may be a stranger's: every field is checked. `at`: seconds since 1970."""

    at: float
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


def read_lines(run: Path) -> list[Line]:
    """The last events of a run folder, oldest first. Torn lines, and lines that are no events, are skipped."""
    return list(_lines(read_tail(run / EVENTS, TAIL_BYTES)))


def _lines(raw_lines: Sequence[bytes]) -> Iterator[Line]:
    for raw in raw_lines:
        try:
            record = json.loads(raw)
            at = datetime.fromisoformat(record["time"]).timestamp()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
            continue
        yield _line(at, record)


def _line(at: float, record: dict[str, Any]) -> Line:
    texts = {name: text(record.get(name)) for name in ("kind", "command", "host", "stage", "job", "unit")}
    code = record.get("exit_code")
    return Line(
        at=at,
        pid=number(record.get("pid")) or 0,
        exit_code=code if type(code) is int and abs(code) < 1000 else None,
        step=number(record.get("step")) or 0,
        total=number(record.get("total")) or 0,
        **texts,
    )


@dataclass(frozen=True)
class Standing:
    """Where a run stands, by its events. rate_per_s: units a second."""

    command: str
    host: str
    pid: int
    heard_at: float
    exit_code: int | None
    has_ended: bool
    at: Line | None
    rate_per_s: float | None


def standing(lines: Sequence[Line]) -> Standing | None:
    """Where the process stands that was heard of last; None without events."""
    if not lines:
        return None
    last = lines[-1]
    own = [line for line in lines if line.kind == "progress" and line.process == last.process and line.total > 0]
    at = own[-1] if own else None
    return Standing(
        command=last.command,
        host=last.host,
        pid=last.pid,
        heard_at=last.at,
        exit_code=last.exit_code if last.kind == "end" else None,
        has_ended=last.kind == "end",
        at=at,
        rate_per_s=_rate([line for line in own if at and (line.stage, line.job) == (at.stage, at.job)]),
    )


def _rate(lines: Sequence[Line]) -> float | None:
    recent = [line for line in lines if lines[-1].at - line.at <= RATE_WINDOW_S]
    steps = recent[-1].step - recent[0].step if recent else 0
    passed_s = recent[-1].at - recent[0].at if recent else 0.0
    return steps / passed_s if steps > 0 and passed_s > 0 else None
