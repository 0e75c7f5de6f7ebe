"""Collect the fingerprints of a run's networks and stores, for run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdpipe.pipeline.run import Run
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.store import KdpipeError, is_url, read_store_manifest


def fingerprints(run: Run) -> dict[str, str]:
    """Return the sha256 of the weights of each finished network, and the fingerprint of each store, by name.

    Missing or unreadable ones are left out.
    """
    jobs = sorted(path.parent for path in run.folder.glob("**/result.json"))
    found = {str(job.relative_to(run.folder)): _weights(job) for job in jobs}
    try:
        stores = [Path(store) for store in (run.store, *run.stores) if not is_url(str(store))]
        found |= {store.name: _store(store) for store in stores}
    except KdpipeError:
        pass
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}


def _weights(job: Path) -> str | None:
    try:
        identity: Any = (read_json_file(JobDir(job).path / "result.json") or {}).get("identity")
    except KdpipeError:
        return None
    sha256 = identity.get("weights_sha256") if isinstance(identity, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _store(path: Path) -> str | None:
    try:
        return read_store_manifest(path).identity.fingerprint
    except KdpipeError:
        return None
