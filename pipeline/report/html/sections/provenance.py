"""Origin of a run's results: its sessions, recipe and stores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.report.html.read import PageRun
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.errors import RunError
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import KdpipeError, is_url, read_store_manifest

MAX_SESSIONS = 20
"""The latest ones are shown."""

SESSION_COLUMNS = ("command", "started", "wall_s", "exit_code", "commit", "device", "host", "peak_memory_bytes")


def provenance(run: PageRun) -> dict[str, object]:
    made: dict[str, object] = dict.fromkeys(("note", "sessions", "last_command"))
    try:
        record = read_json_file(run.path / "run.json")
        made |= _sessions(record) if record else {"note": "This run has no run.json: its sessions are not known."}
    except RunError as error:
        made["note"] = run.without_path(error)
    recipe = json.dumps(run.recipe, indent=1, ensure_ascii=False, default=str).splitlines()
    return made | {"stores": _stores(run), "recipe": recipe}


def _sessions(record: Mapping[str, Any]) -> dict[str, object]:
    recorded = record.get("sessions")
    sessions = [session for session in recorded if isinstance(session, Mapping)] if isinstance(recorded, list) else []
    keys = [key for key in SESSION_COLUMNS if any(session.get(key) is not None for session in sessions)]
    rows = [[number, *(_cell(key, session.get(key)) for key in keys)] for number, session in enumerate(sessions, 1)]
    table = Table("Sessions", ["number", *(key.replace("_", " ") for key in keys)], rows[-MAX_SESSIONS:], num_names=2)
    last = sessions[-1].get("argv") if sessions else None
    return {
        "sessions": table if keys else None,
        "last_command": shlex.join(map(str, last)) if isinstance(last, list) else None,
    }


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float) and key in ("wall_s", "peak_memory_bytes"):
        return f"{value:,.1f}" if key == "wall_s" else f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)[:12] if key == "commit" else str(value)


def _stores(run: PageRun) -> Table | None:
    """Return the fingerprints of the stores in the run folder and of those that its recipe names."""
    student, cache = run.recipe.get("student", {}), run.recipe.get("cache", {})
    named = [path for path in (*student.get("stores", ()), cache.get("store")) if path and not is_url(str(path))]
    rows: list[list[object]] = []
    for path in [*map(Path, named), *sorted(run.path.glob("*.zarr"))]:
        try:
            identity = read_store_manifest(path).identity
        except KdpipeError as error:
            rows.append([path.name, run.without_path(error), "-", "-"])
            continue
        data = identity.data
        contents = f"{data.get('name', '-')} {data.get('split', '')}, {data.get('num_samples', '-')} samples"
        rows.append([path.name, identity.fingerprint, contents, identity.teacher.get("weights_sha256", "-")])
    headers = ["store", "fingerprint", "data", "the teacher's weights, sha256"]
    return Table("Stores", headers, rows, num_names=9) if rows else None
