"""The staging cache: its place and its limits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.staging_jobs import entries, require_equal, stage_elsewhere

from kdpipe.store import Codec, StoreError
from kdpipe.store.remote.staging import stage
from kdpipe.store.remote.staging_cache import StagingCache, default_staging_cache


@pytest.fixture
def cache(tmp_path) -> StagingCache:
    return StagingCache(tmp_path / "cache", 2**30)


def test_store_that_cannot_fit_is_refused(store_maker, cache, monkeypatch):
    small = store_maker("small.zarr", num_samples=300, codec=Codec())
    large = store_maker("large.zarr", codec=Codec())
    first = stage_elsewhere(small.path, cache).parent
    with pytest.raises(StoreError, match=r"needs 1,9\d\d,\d\d\d bytes .* 2,000,000 together, others leave 1,"):
        stage(large.path, replace(cache, max_bytes=2 * 10**6))
    usage = shutil.disk_usage(cache.folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(StoreError, match=r"needs 1,9\d\d,\d\d\d bytes in .* and the disk has .* free.*KDPIPE_CACHE"):
        stage(large.path, cache)
    assert entries(cache) == {first}
    require_equal(stage(small.path, cache), small)


@pytest.mark.parametrize(
    ("environ", "folder", "max_bytes"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/kdpipe/stores", 200 * 2**30),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/scratch"}, "/scratch/kdpipe/stores", 200 * 2**30),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "scratch"}, "/home/me/.cache/kdpipe/stores", 200 * 2**30),
        ({"KDPIPE_CACHE": "/fast", "XDG_CACHE_HOME": "/scratch", "KDPIPE_CACHE_BYTES": "5000"}, "/fast", 5000),
    ],
)
def test_environment_sets_staging_cache(environ, folder, max_bytes):
    assert default_staging_cache(environ) == StagingCache(Path(folder), max_bytes)


@pytest.mark.parametrize("text", ["200G", "-1", "1e9", "9" * 30])
def test_invalid_cache_bytes_are_reported(text):
    with pytest.raises(StoreError, match="KDPIPE_CACHE_BYTES is "):
        default_staging_cache({"KDPIPE_CACHE_BYTES": text})
