"""Remote and compressed stores are staged once, checked, resumed, extended and evicted in order."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.made_store import SPECS, MadeStore, folder_bytes, make_store
from support.s3_server import s3_environment, s3_server, upload_folder
from support.staging_jobs import Web, entries, require_equal, running, stage_elsewhere, staging_process

from kdpipe.stages.errors import StoppedEarly
from kdpipe.store import (
    ArraySpec,
    Codec,
    Samples,
    StoreError,
    StoreLayout,
    create_store,
    ensure_store,
    exclusive,
    finish_store,
    missing_arrays,
    missing_units,
    open_store,
    read_store_manifest,
    write_unit,
)
from kdpipe.store.format.markers import read_marker, write_marker
from kdpipe.store.remote.staging import needs_staging, stage
from kdpipe.store.remote.staging_cache import StagingCache

ROOMY = 2**30


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    with running(Web(tmp_path / "web")) as server:
        yield server


@pytest.fixture
def made(tmp_path, web) -> MadeStore:
    """A store on the web server, as a.zarr."""
    return make_store(tmp_path / "web" / "a.zarr")


@pytest.fixture
def cache(tmp_path) -> StagingCache:
    return StagingCache(tmp_path / "cache", ROOMY)


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


def test_a_stop_request_ends_staging_and_keeps_what_is_staged(made, web, cache):
    web.hold_back(3)

    def check() -> None:
        if len(web.shards) > 3:  # a server that keeps the next ones back
            raise StoppedEarly("at SIGTERM")

    with pytest.raises(StoppedEarly):
        stage(f"{web.url}/a.zarr", cache, check=check)
    (entry,) = entries(cache)
    with exclusive("it", entry / "staging.lock"), pytest.raises(StoppedEarly):  # another job is staging it
        stage(f"{web.url}/a.zarr", cache, check=check)
    web.freely.set()
    require_equal(stage(f"{web.url}/a.zarr", cache), made)


@pytest.mark.parametrize("codec", [Codec(), Codec("blosc", 1)])
def test_archive_becomes_mapped_store_with_same_rows(store_maker, cache, codec):
    made = store_maker(codec=codec)
    seen = []
    copy = stage(made.path, cache, lambda done, total: seen.append((done, total)))
    require_equal(copy, made)
    assert seen == [(done, len(made.units)) for done in range(1, len(made.units) + 1)]


def test_staged_archive_equals_uncompressed_store(store_maker, cache):
    plain, packed = store_maker("plain.zarr"), store_maker("packed.zarr", codec=Codec())
    assert folder_bytes(stage(packed.path, cache)) == folder_bytes(plain.path)


def test_encoding_loss_is_carried_over(store_maker, cache):
    made = store_maker(codec=Codec(), fill=False)
    figures = {"num_rows": 1, "largest_error": 0.5, "squared_error": 0.25, "squared": 1.0}
    for unit in made.units:
        write_unit(made.path, made.manifest, unit, made.rows(unit), {"features/layer2.0": figures})
    finish_store(made.path)
    fidelity = open_store(made.path).fidelity
    assert fidelity["features/layer2.0"]["relative_rms"] == 0.5
    assert open_store(stage(made.path, cache)).fidelity == fidelity


def test_only_what_cannot_be_mapped_needs_staging(store_maker, cache):
    plain, packed = store_maker("plain.zarr"), store_maker("packed.zarr", codec=Codec(), fill=False)
    assert needs_staging(plain.path) is None
    assert needs_staging(packed.path) == "it is an archive, its chunks compressed by zstd"
    assert needs_staging("s3://bucket/store.zarr") == "it is not on this machine"
    assert stage(plain.path, cache) == plain.path
    assert not cache.folder.exists()


@pytest.mark.parametrize("codec", [None, Codec()])
def test_a_store_in_a_bucket_is_staged_and_read(endpoint, store_maker, cache, codec, monkeypatch):
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    made = store_maker(codec=codec)
    url = upload_folder(endpoint, "stores", "packed" if codec else "plain", made.path)
    require_equal(stage(url, cache), made)


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as endpoint:
        yield endpoint


def test_staged_store_is_fetched_once(made, web, cache):
    first = stage(f"{web.url}/a.zarr", cache)
    assert sorted(web.shards) == sorted(set(web.shards))
    assert len(web.shards) == len(made.units) * len(SPECS)
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == stage_elsewhere(f"{web.url}/a.zarr/", cache) == first
    assert web.asked == ["a.zarr/zarr.json"] * 2
    require_equal(first, made)


DAMAGED = "features/layer2.0/c/1/2/0/0/0"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "key", "message"),
    [
        (lambda file: flip(file, 1000), DAMAGED, "its bytes are not those that were committed"),
        (truncate, DAMAGED, "its bytes are not those that were committed"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), DAMAGED, "where at most"),
        (lambda file: file.unlink(), DAMAGED, "it is missing, though it was committed"),
        (lambda file: file.unlink(), "markers/c/1/2/0", "it is missing, though its unit was finished"),
        (lambda file: flip(file, 30), "markers/c/1/2/0", "is damaged"),
        (lambda file: shutil.copy(file.parents[1] / "1/0", file), "markers/c/1/2/0", "belongs to another store"),
        (lambda file: flip(file, 30), "samples/ids/c/0", "its digests do not match"),
        (lambda file: file.unlink(), "samples/ids/c/0", "it is missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_never_staged(made, web, cache, damage, key, message):
    (made.path / key).rename(made.path / "kept")
    shutil.copy(made.path / "kept", made.path / key)
    damage(made.path / key)
    with pytest.raises(StoreError, match=f"{key.removesuffix('/ids/c/0')}.*{message}") as caught:
        stage(f"{web.url}/a.zarr", cache)
    assert web.url in str(caught.value)

    (made.path / "kept").rename(made.path / key)
    for copy in cache.folder.glob("*/targets.zarr"):
        manifest = read_store_manifest(copy)
        assert manifest.finished is None
        assert "features/layer2.0" in missing_arrays(copy, manifest, made.units[-1])
    before = web.shards.copy()
    require_equal(stage(f"{web.url}/a.zarr", cache), made)
    again = set(before) & set(web.shards[len(before) :])
    assert all("/c/1/2/" in shard for shard in again), "what was staged before the damage was found is kept"


def test_a_damaged_archive_is_refused_by_name(store_maker, cache):
    made = store_maker(codec=Codec())
    flip(made.path / DAMAGED, 1000)
    with pytest.raises(StoreError, match=f"{made.path / DAMAGED}.*not those that were committed"):
        stage(made.path, cache)


def test_file_removed_from_cache_is_fetched_again(made, web, cache):
    copy = stage(f"{web.url}/a.zarr", cache)
    (copy / DAMAGED).unlink()
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert web.shards == [f"a.zarr/{DAMAGED}"]
    require_equal(copy, made)


def test_killed_staging_resumes(made, web, cache):
    web.hold_back(shards_allowed=7)
    process = staging_process(f"{web.url}/a.zarr", cache)
    web.wait_for(lambda: len(web.shards) >= 10, process)  # every fetcher is held back, in a unit that it cannot end
    process.send_signal(signal.SIGKILL)
    process.communicate()

    (copy,) = cache.folder.glob("*/targets.zarr")
    done = [unit for unit in made.units if unit not in missing_units(copy, read_store_manifest(copy))]
    assert 0 < len(done) < len(made.units)
    with pytest.raises(StoreError, match="is not complete"):
        open_store(copy)

    web.freely.set()
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert len(web.shards) == (len(made.units) - len(done)) * len(SPECS)
    require_equal(copy, made)
    assert not list(copy.rglob("*.partial"))


def test_two_jobs_that_stage_one_store_fetch_each_file_once(made, web, cache):
    web.hold_back(shards_allowed=1)
    jobs = [staging_process(f"{web.url}/a.zarr", cache) for _ in range(2)]
    web.wait_for(lambda: web.asked.count("a.zarr/zarr.json") == 2 and web.shards, *jobs)
    web.freely.set()
    copies = {job.communicate(timeout=60)[0] for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(copies) == 1
    assert sorted(web.shards) == sorted(set(web.shards))
    require_equal(Path(copies.pop().strip()), made)


def extended(made: MadeStore, num_views: int, specs: tuple[ArraySpec, ...] = SPECS) -> MadeStore:
    """The same store with room for more views and layers, and the numbers that belong there."""
    manifest = replace(made.manifest, arrays=specs, layout=replace(made.manifest.layout, num_views=num_views))
    rng = np.random.default_rng(8)
    contents = {}
    for spec in specs:
        contents[spec.name] = rng.standard_normal((num_views, *made.samples.ids.shape, *spec.row_shape))
        contents[spec.name] = contents[spec.name].astype(spec.dtype)
        if spec.name in made.contents:
            contents[spec.name][: made.manifest.layout.num_views] = made.contents[spec.name]
    return MadeStore(made.path, ensure_store(made.path, manifest, made.samples), made.samples, contents)


def test_only_new_views_are_fetched(made, web, cache):
    copy = stage(f"{web.url}/a.zarr", cache)
    more = extended(made, num_views=4)
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert web.asked == ["a.zarr/zarr.json"], "an extension counts when it is finished"
    require_equal(copy, made)

    more.fill(missing_units(made.path, more.manifest))
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert {key.split("/c/")[1][0] for key in web.shards} == {"2", "3"}
    require_equal(copy, more)


def test_only_new_layer_is_fetched(made, web, cache):
    copy = stage(f"{web.url}/a.zarr", cache)
    more = extended(made, num_views=2, specs=(*SPECS, ArraySpec("pooled/layer3", (8,), "float16")))
    more.fill(more.units)
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert len(web.shards) == len(made.units)
    assert all(key.startswith("a.zarr/pooled/layer3/c/") for key in web.shards)
    require_equal(copy, more)


def growing(path: Path) -> tuple[MadeStore, MadeStore]:
    """A store, and the same after two extensions by 150 samples, not filled yet."""
    made = make_store(path.with_name("pattern.zarr"), fill=False)
    data = {**made.manifest.identity.data, "num_samples": len(made.samples.ids)}
    manifest = replace(made.manifest, identity=replace(made.manifest.identity, data=data))
    create_store(path, manifest, made.samples)
    small = MadeStore(path, manifest, made.samples, made.contents)
    small.fill(small.units)
    samples = made.samples
    for start in (0, 150):
        added = np.arange(start, start + 150, dtype=np.int64)
        samples = samples.followed_by(Samples(10**6 + added, added % 10, added.astype(np.uint32)))
        grown = ensure_store(path, manifest, samples)
    contents = {}
    for spec in SPECS:
        contents[spec.name] = np.ones((2, grown.layout.num_rows, *spec.row_shape), spec.dtype)
        contents[spec.name][:, :2500] = made.contents[spec.name]
    return small, MadeStore(path, grown, samples, contents)


def test_only_new_samples_are_fetched(tmp_path, web, cache):
    small, large = growing(tmp_path / "web" / "a.zarr")
    copy = stage(f"{web.url}/a.zarr", cache)
    assert read_store_manifest(copy).identity == small.manifest.identity, "what is not finished does not count"
    assert open_store(copy).num_samples == 2500

    large.fill(missing_units(large.path, large.manifest))
    web.asked.clear()
    assert stage(f"{web.url}/a.zarr", cache) == copy
    assert {key.split("/c/")[1][:3] for key in web.shards} == {"0/3", "0/4", "1/3", "1/4"}
    staged, source = open_store(copy), open_store(large.path)
    assert staged.provenance == source.provenance
    for name in large.contents:
        gathered = staged.gather(name, 1, large.samples.ids)
        assert np.array_equal(gathered, source.gather(name, 1, large.samples.ids))

    web.asked.clear()
    other = stage(f"{web.url}/a.zarr", StagingCache(tmp_path / "other", ROOMY))
    assert folder_bytes(other) == folder_bytes(copy), "grown or staged at once, it is the same store"


def test_diverged_store_gets_its_own_copy(store_maker, cache):
    made = store_maker("a.zarr", codec=Codec())
    specs = (SPECS[0], replace(SPECS[1], dtype="float16"))
    other = store_maker("b.zarr", codec=Codec(), specs=specs)
    copies = [stage(one.path, cache) for one in (made, other, made, other)]
    assert copies[0] == copies[2] != copies[1] == copies[3]
    require_equal(copies[0], made)
    require_equal(copies[1], other)


def test_a_rounded_store_and_the_exact_one_never_mix(store_maker, cache):
    made, other = (store_maker(name, codec=Codec()) for name in ("a.zarr", "b.zarr"))
    with_manifest(other.path, replace(read_store_manifest(other.path), rounded={"logits": 5}))
    exact, rounded = stage(made.path, cache), stage(other.path, cache)
    assert exact.parent != rounded.parent
    assert [dict(read_store_manifest(copy).rounded) for copy in (exact, rounded)] == [{}, {"logits": 5}]


def test_disk_error_is_reported_and_staged_units_are_kept(made, web, cache, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if web.shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="the disk is full.*What is committed is safe"):
        stage(f"{web.url}/a.zarr", cache)
    monkeypatch.undo()
    require_equal(stage(f"{web.url}/a.zarr", cache), made)


def with_manifest(path: Path, manifest) -> None:
    """Change a store's manifest, as an attacker could."""
    record = json.loads((path / "zarr.json").read_bytes())
    record["attributes"]["kdpipe"] = manifest.to_json()
    (path / "zarr.json").write_text(json.dumps(record))


@pytest.mark.parametrize("codec", [None, Codec()])
def test_marker_with_implausible_sizes_is_refused(tmp_path, web, cache, codec):
    made = make_store(tmp_path / "web" / "a.zarr", codec=codec)
    unit = made.units[-1]
    honest = read_marker(made.path, made.manifest, unit)
    files = {**honest.files, "logits": {"bytes": 2**40, "crc32c": 0}}
    write_marker(made.path, made.manifest, unit, replace(honest, files=files))
    with pytest.raises(StoreError, match="logits/c/1/2/0 .*its 1,099,511,627,776 bytes cannot hold"):
        stage(f"{web.url}/a.zarr", cache)
    assert "a.zarr/logits/c/1/2/0" not in web.asked


def test_a_fingerprint_that_is_a_path_goes_nowhere(made, web, cache):
    manifest = read_store_manifest(made.path)
    with_manifest(
        made.path,
        replace(manifest, layout=StoreLayout(2, 1024, (2048, 452)), previous_fingerprints=("../../../../../../tmp/x",)),
    )
    with pytest.raises(StoreError, match="is not a fingerprint"):
        stage(f"{web.url}/a.zarr", cache)
    with_manifest(
        made.path, replace(manifest, layout=StoreLayout(2, 1024, (2048, 452)), previous_fingerprints=("a" * 64,))
    )
    with pytest.raises(StoreError, match="fingerprint of segment 0 is not that of its samples"):
        stage(f"{web.url}/a.zarr", cache)
    assert not entries(cache)


def test_unfinished_or_absent_source_is_reported(tmp_path, web, cache):
    make_store(tmp_path / "web" / "b.zarr", fill=False)
    with pytest.raises(StoreError, match=r"/b.zarr is not complete: run `kdpipe cache-teacher`"):
        stage(f"{web.url}/b.zarr", cache)
    with pytest.raises(StoreError, match=r"there is no store at http.*/c.zarr"):
        stage(f"{web.url}/c.zarr", cache)
    with pytest.raises(StoreError, match="there is no store at"):
        stage(tmp_path / "c.zarr", cache)
