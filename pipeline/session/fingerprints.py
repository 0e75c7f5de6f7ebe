"""What a run's teacher, stores and students are called: for the record of the run, whatever of it is there by now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.run import Walk
from stages.job_folder import JobFolder, read_json
from store import KdpipeError, is_url, read_store_manifest


def fingerprints(walk: Walk) -> dict[str, str]:
    """By what it is of: sha256 over the weights of each finished network, and the fingerprint of each store.

    What is not there, or cannot be read, is left out: whoever needs it has said so.
    """
    run = walk.run
    jobs = sorted(path.parent for path in run.glob("**/result.json"))
    found = {str(job.relative_to(run)): _weights(job) for job in jobs}
    try:
        places = [Path(place) for place in (walk.store, *walk.stores) if not is_url(str(place))]
        found |= {place.name: _store(place) for place in places}
    except KdpipeError:
        pass
    return {name: one for name, one in found.items() if one is not None}


def _weights(job: Path) -> str | None:
    try:
        identity: Any = (read_json(JobFolder(job).path / "result.json") or {}).get("identity")
    except KdpipeError:
        return None
    sha256 = identity.get("weights_sha256") if isinstance(identity, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _store(path: Path) -> str | None:
    try:
        return read_store_manifest(path).identity.fingerprint
    except KdpipeError:
        return None
