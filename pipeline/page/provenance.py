"""Where a run's figures come from: its sessions, recipe, stores, and the networks' weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.page.markup import Html, details, element, join, note, safe, table
from pipeline.page.read import PageRun
from pipeline.terminal.output import printable
from stages.errors import RunError
from stages.job_folder import read_json
from store import KdpipeError, is_url, read_store_manifest

MOST_SESSIONS = 20
"""The last so many are listed."""

SHOWN_KEYS = ("command", "started", "wall_s", "exit_code", "commit", "device", "host", "peak_memory_bytes")


def provenance(run: PageRun) -> Html:
    """The section: whatever of it there is."""
    return join([*_sessions(run), *_stores(run), *_weights(run), details("The recipe, every key", pretty(run.recipe))])


def pretty(record: object) -> Html:
    """A JSON value as people read it, line by line, so that no line can hide another."""
    lines = json.dumps(record, indent=1, ensure_ascii=False, default=str).splitlines()
    return element("pre", join([safe(printable(line)) for line in lines], "\n"), tabindex=0)


def _sessions(run: PageRun) -> Iterator[Html]:
    try:
        record = read_json(run.path / "run.json")
    except RunError as error:
        yield note(run.discreet(error))
        return
    if record is None:
        yield note("Which commands made this run, where and when, was not kept by the kdpipe that made it.")
        return
    held = record.get("sessions")
    sessions = [one for one in held if isinstance(one, Mapping)] if isinstance(held, list) else []
    keys = [key for key in SHOWN_KEYS if any(one.get(key) is not None for one in sessions)]
    if keys:
        cells = ([number, *(_cell(key, one.get(key)) for key in keys)] for number, one in enumerate(sessions, 1))
        shown = list(cells)[-MOST_SESSIONS:]
        yield table("Sessions that worked on this run", ["number", *(_header(key) for key in keys)], shown, num_names=2)
    last = sessions[-1].get("argv") if sessions else None
    if isinstance(last, list):
        yield element("p", "The last command: ", element("code", shlex.join(map(str, last))))
    kept = {**record, "sessions": sessions[-MOST_SESSIONS:]}
    kept.pop("recipe", None)
    yield details("All that was kept about the last sessions", pretty(kept))


HEADERS = {"wall_s": "wall clock", "exit_code": "exit status", "peak_memory_bytes": "peak memory"}


def _header(key: str) -> str:
    return HEADERS.get(key, key.replace("_", " "))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float) and key == "wall_s":
        return f"{value:,.1f} s"
    if isinstance(value, int | float) and key == "peak_memory_bytes":
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    text = str(value)
    return text[:12] if key == "commit" else text


def _stores(run: PageRun) -> Iterator[Html]:
    """The fingerprints of the stores that lie in the run folder, or that its recipe names."""
    student, cache = run.recipe.get("student", {}), run.recipe.get("cache", {})
    named = [one for one in (*student.get("stores", ()), cache.get("store")) if one and not is_url(str(one))]
    places = [*map(Path, named), *sorted(run.path.glob("*.zarr"))]
    lines: list[list[object]] = []
    for place in places:
        try:
            manifest = read_store_manifest(place)
        except KdpipeError as error:
            lines.append([place.name, run.discreet(error), "-", "-"])
            continue
        data = manifest.identity.data
        lines.append(
            [
                place.name,
                element("code", manifest.identity.fingerprint),
                f"{data.get('name', '-')} {data.get('split', '')}, {data.get('num_samples', '-')} samples",
                element("code", str(manifest.identity.teacher.get("weights_sha256", "-"))),
            ]
        )
    if lines:
        yield table("Stores", ["store", "fingerprint", "of", "the teacher's weights, sha256"], lines, num_names=9)


def _weights(run: PageRun) -> Iterator[Html]:
    lines: list[list[object]] = []
    for network in run.networks:
        for job in network.done:
            identity = (job.result or {}).get("identity") or {}
            sha = element("code", str(identity.get("weights_sha256", "-")))
            lines.append([network.name, str(job.folder.relative_to(run.path)), sha])
    if lines:
        yield details(
            "The networks' weights", table("Weights, sha256", ["network", "folder", "sha256"], lines, num_names=9)
        )
