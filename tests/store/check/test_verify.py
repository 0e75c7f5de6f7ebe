"""`verify_store` finds every fault, does not stop at the first, and reports no false ones."""

import dataclasses
import json

import numpy as np
import pytest
from support.made_store import SPECS

from kdpipe.store import Codec, KdpipeError, StoreError, ensure_store
from kdpipe.store.check import verify
from kdpipe.store.check.verify import verify_store
from kdpipe.store.format.markers import marker_key, marker_path, read_marker, write_marker
from kdpipe.store.format.shard import shard_key, shard_path
from kdpipe.store.format.zarr_metadata import metadata_bytes


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def named(verdict):
    return [fault.key for fault in verdict.damaged]


@pytest.fixture(params=[None, Codec("zstd"), Codec("blosc")], ids=["zero-copy", "zstd", "blosc"])
def any_profile(request, store_maker):
    return store_maker(num_samples=900, codec=request.param)


def test_valid_store_has_no_fault_and_every_byte_is_read(any_profile):
    verdict = verify_store(any_profile.path)
    assert (verdict.damaged, verdict.missing) == ((), ())
    assert verdict.num_units_whole == verdict.num_units == len(any_profile.units)
    assert verdict.num_bytes == sum(file.stat().st_size for file in any_profile.path.rglob("*") if file.is_file())


def test_a_flipped_bit_in_any_file_is_found_and_its_file_named(any_profile):
    rng = np.random.default_rng(5)
    files = [file for file in any_profile.path.rglob("*") if file.is_file()]
    assert len(files) == 18
    for file in files:
        size, key = file.stat().st_size, file.relative_to(any_profile.path).as_posix()
        for at in {0, size - 1, int(rng.integers(size))}:
            bit = int(rng.integers(8))
            flip(file, at, bit)
            found = named(verify_store(any_profile.path))
            assert found, f"bit {bit} of byte {at} of {key}"
            assert all(key.startswith(one) for one in found)
            flip(file, at, bit)
    assert not verify_store(any_profile.path).damaged


@pytest.mark.parametrize("which", ["zarr.json", "markers/zarr.json", "logits/zarr.json", "a marker"])
def test_every_byte_of_metadata_and_markers_counts(store_maker, which):
    made = store_maker(num_samples=20, num_views=1, specs=SPECS[:1])  # read hundreds of times
    file = marker_path(made.path, made.units[0]) if which == "a marker" else made.path / which
    last = len(file.read_bytes().rstrip(b" "))
    for at in range(0, last, 7):
        flip(file, at, at % 8)
        assert verify_store(made.path).damaged, at
        flip(file, at, at % 8)


def test_all_faults_are_listed_whatever_comes_first(made):
    logits, features = made.manifest.arrays
    first, second, third, *_, last = made.units
    (made.path / "logits" / "zarr.json").write_text("{")
    flip(made.path / "samples" / "labels" / "c" / "0", 100, 1)
    flip(shard_path(made.path, logits, first), 77, 3)
    shard_path(made.path, features, first).unlink()
    marker_path(made.path, second).unlink()
    flip(marker_path(made.path, third), 9000, 0)
    torn = shard_path(made.path, features, last)
    torn.write_bytes(torn.read_bytes()[:-1])
    verdict = verify_store(made.path)
    assert named(verdict) == [
        "logits/zarr.json",
        "samples",
        shard_key(logits, first),
        shard_key(features, first),
        marker_key(second),
        marker_key(third),
        shard_key(features, last),
    ]
    assert [fault.array for fault in verdict.damaged[2:4]] == ["logits", "features/layer2.0"]
    assert "ids or labels" in verdict.damaged[1].what
    assert "were committed" in str(verdict.damaged[-1])
    assert verdict.num_units_whole == len(made.units) - 4
    json.dumps(verdict.to_json())


def test_faults_outside_units_are_found(made):
    (made.path / "zarr.json").write_text(
        (made.path / "zarr.json").read_text().replace('"kdpipe": "0"', '"kdpipe": "1"')
    )
    assert named(verify_store(made.path)) == ["zarr.json"]
    with pytest.raises(StoreError, match="edited or damaged"):
        ensure_store(made.path, made.manifest, made.samples)


def test_unfinished_units_are_missing_and_not_damaged(store_maker):
    made = store_maker(fill=False)
    made.fill(made.units[1:])
    verdict = verify_store(made.path)
    assert not verdict.damaged
    assert verdict.missing == ((made.units[0], ("logits", "features/layer2.0")),)
    assert verdict.num_units_whole == len(made.units) - 1


def test_unfinished_extension_is_missing_finished_part_is_not(made):
    layout = dataclasses.replace(made.manifest.layout, num_views=3)
    ensure_store(made.path, dataclasses.replace(made.manifest, layout=layout), made.samples)
    assert {unit.view for unit, _ in verify_store(made.path).missing} == {2}
    marker_path(made.path, made.units[0]).unlink()
    verdict = verify_store(made.path)
    assert named(verdict) == [marker_key(made.units[0])]
    assert {unit.view for unit, _ in verdict.missing} == {2}


def test_rows_between_segments_must_be_empty(made):
    column = made.path / "samples" / "ids" / "c" / "0"
    flip(column, 8 * 2600, 1)  # row 2600 of 2500
    verdict = verify_store(made.path)
    assert named(verdict) == ["samples/ids/c/0"]
    assert "not empty" in verdict.damaged[0].what


def test_units_are_counted_and_a_caller_may_stop(made):
    seen = []
    verify_store(made.path, lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, len(made.units)) for number in range(len(made.units))]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_store(made.path, stop)


def test_store_without_lock_support_is_verified(made, monkeypatch):
    def refuse(path):
        raise KdpipeError("no locks here")

    monkeypatch.setattr(verify, "exclusive_store", refuse)
    assert not verify_store(made.path).damaged


def test_absent_store_is_an_error_lost_manifest_a_fault(made, tmp_path):
    with pytest.raises(StoreError, match="no store at"):
        verify_store(tmp_path / "none.zarr")
    (made.path / "zarr.json").unlink()
    assert named(verify_store(made.path)) == ["zarr.json"]
    assert named(verify_store(made.path, manifest=made.manifest)) == ["zarr.json"]


def test_untrusted_sizes_do_not_decide_memory_use(any_profile):
    made, unit = any_profile, any_profile.units[0]
    marker = read_marker(made.path, made.manifest, unit)
    claimed = {**marker.files, "logits": {"bytes": 2**60, "crc32c": 1}}
    write_marker(made.path, made.manifest, unit, dataclasses.replace(marker, files=claimed))
    verdict = verify_store(made.path)
    assert named(verdict) == [shard_key(made.manifest.arrays[0], unit)]
    assert f"{2**60:,} bytes" in verdict.damaged[0].what
    layout = dataclasses.replace(made.manifest.layout, unit_rows=2**20, segments=(2**32,), num_views=1)
    (made.path / "zarr.json").write_bytes(
        metadata_bytes(dataclasses.replace(made.manifest, layout=layout))["zarr.json"]
    )
    verdict = verify_store(made.path)
    assert len(verdict.damaged) < 8000
    assert "samples/ids" in named(verdict)
