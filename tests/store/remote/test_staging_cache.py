"""The staging cache: limits, eviction, and crashes."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.staging_jobs import entries, require_equal, stage_elsewhere

from kdpipe.store import Codec, StoreError, open_store
from kdpipe.store.remote.staging import stage
from kdpipe.store.remote.staging_cache import StagingCache, default_staging_cache


@pytest.fixture
def cache(tmp_path) -> StagingCache:
    return StagingCache(tmp_path / "cache", 2**30)


def test_least_recently_used_is_evicted_unless_in_use(store_maker, cache):
    first, second, third = (store_maker(f"{n}.zarr", num_samples=n, codec=Codec()).path for n in (2500, 2400, 2300))
    one = stage_elsewhere(first, cache).parent
    num_bytes = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    small = replace(cache, max_bytes=int(2.5 * num_bytes))
    two = stage_elsewhere(second, small).parent
    assert stage_elsewhere(first, small).parent == one  # so that the second is the one used longest ago
    three = stage(third, small).parent
    assert entries(cache) == {one, three}
    assert not two.exists()

    assert stage(second, small).parent == two
    assert entries(cache) == {two, three}
    with pytest.raises(StoreError, match="In use") as refused:
        stage(first, small)
    for text in ("KDPIPE_CACHE_BYTES", "KDPIPE_CACHE ", f"{small.max_bytes:,}", two.name, three.name, str(os.getpid())):
        assert text in str(refused.value)
    assert entries(cache) == {two, three}
    open_store(two / "targets.zarr")
    assert stage(first, cache).parent == one, "with a higher limit it fits"


def test_nothing_is_evicted_for_a_store_that_cannot_fit(store_maker, cache, monkeypatch):
    small = store_maker("small.zarr", num_samples=300, codec=Codec())
    large = store_maker("large.zarr", codec=Codec())
    idle = stage_elsewhere(small.path, cache).parent
    with pytest.raises(StoreError, match=r"needs 1,9\d\d,\d\d\d bytes in .* may take 1,000,000 together"):
        stage(large.path, replace(cache, max_bytes=10**6))
    usage = shutil.disk_usage(cache.folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(StoreError, match=r"needs 1,9\d\d,\d\d\d bytes in .* and the disk has .* free.*KDPIPE_CACHE"):
        stage(large.path, cache)
    assert entries(cache) == {idle}
    require_equal(stage(small.path, cache), small)


def test_a_crash_in_an_eviction_leaves_no_half_store(store_maker, cache, monkeypatch):
    first, second = (store_maker(f"{n}.zarr", num_samples=n, codec=Codec()) for n in (2500, 2400))
    small = replace(cache, max_bytes=3 * 10**6)
    one = stage_elsewhere(first.path, small).parent

    def crash(folder, **_):
        next(folder.rglob("c")).rename(folder / "gone")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            stage(second.path, small)
    assert not one.exists()
    assert len(list(cache.folder.glob(".*.partial"))) == 1
    require_equal(stage(second.path, small), second)
    assert not list(cache.folder.glob(".*.partial"))


def test_copy_is_kept_also_after_removal_by_hand(store_maker, cache):
    first, second = (store_maker(f"{n}.zarr", num_samples=n, codec=Codec()).path for n in (2500, 2400))
    small = replace(cache, max_bytes=3 * 10**6)
    shutil.rmtree(stage(first, small).parent)
    one = stage(first, small).parent
    with pytest.raises(StoreError, match="In use"):
        stage(second, small)
    assert entries(cache) == {one}


def test_foreign_folders_are_never_evicted(store_maker, cache):
    first, second = (store_maker(f"{n}.zarr", num_samples=n, codec=Codec()) for n in (2500, 2400))
    small = replace(cache, max_bytes=3 * 10**6)
    one = stage_elsewhere(first.path, small).parent
    others = [cache.folder / name for name in ("thesis", ".thesis.0123abcd.partial", f"{one.name}-old")]
    for other in others:
        other.mkdir()
        (other / "chapter").write_bytes(bytes(10**6))
        os.utime(other, (0, 0))
    two = stage(second.path, small).parent
    assert entries(cache) == {two}
    assert all((other / "chapter").exists() for other in others)


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
