"""The teacher's head in a store: read by plain Zarr, checked, copied with the store, added to one that lacks it."""

from dataclasses import replace

import numpy as np
import pytest
import zarr
from support.made_store import SPECS, folder_bytes, make_store
from support.transcoded import ZSTD

from kdpipe.store import (
    ArraySpec,
    FingerprintMismatch,
    StagingCache,
    StoreError,
    TranscodeOptions,
    create_store,
    ensure_store,
    open_store,
    read_store_manifest,
    stage,
    transcode,
)
from kdpipe.store.check.verify import verify_store
from kdpipe.store.format.encodings.head import HEAD_KEY, head_record

HEAD = np.random.default_rng(3).standard_normal((10, 6)).astype(np.float32)


@pytest.fixture
def made(tmp_path):
    return make_store(tmp_path / "a.zarr", num_samples=300, head=HEAD)


def test_plain_zarr_reads_the_head(made):
    assert np.array_equal(zarr.open_group(made.path, mode="r")["head/pre_logits"][:], HEAD)
    assert np.array_equal(open_store(made.path).head, HEAD)
    assert verify_store(made.path).ok


@pytest.mark.parametrize("change", ["flip a bit", "remove it"])
def test_damaged_head_is_found_and_refused(made, change):
    file = made.path / HEAD_KEY
    raw = bytearray(file.read_bytes())
    raw[17] ^= 1
    file.unlink()
    if change == "flip a bit":
        file.write_bytes(raw)
    (fault,) = verify_store(made.path).damaged
    assert fault.key == HEAD_KEY and fault.unit is None
    with pytest.raises(StoreError, match="kdpipe store repair RECIPE"):
        open_store(made.path).head  # noqa: B018


def test_damaged_record_is_refused(made):
    for shape in ([10], [10, 1], [10, -6], [2**20, 2**20]):
        record = replace(made.manifest, head=replace(head_record(HEAD), shape=shape))
        with pytest.raises(StoreError, match="would be refused"):
            create_store(made.path.with_name("b.zarr"), record, made.samples, HEAD)


def test_archive_and_staged_copy_have_the_head(made, tmp_path):
    archive = tmp_path / "b.zarr"
    transcode(made.path, archive, TranscodeOptions(codec=ZSTD, arrays=()))
    assert verify_store(archive).ok
    assert np.array_equal(open_store(stage(archive, StagingCache(tmp_path / "cache", 2**30))).head, HEAD)


def test_head_is_added_to_a_store_and_its_copies(made, tmp_path):
    """Nothing else is written; a staged copy of the store before gets it too."""
    path, cache = tmp_path / "b.zarr", StagingCache(tmp_path / "cache", 2**30)
    transcode(make_store(tmp_path / "c.zarr", num_samples=300).path, path, TranscodeOptions(codec=ZSTD))
    assert open_store(path).head is open_store(stage(path, cache)).head is None
    before, wanted = folder_bytes(path), replace(read_store_manifest(path), head=head_record(HEAD))
    ensure_store(path, wanted, made.samples, head=HEAD)
    after = folder_bytes(path)
    assert {key for key in after if after[key] != before.get(key)} == {
        "zarr.json", "head/zarr.json", "head/pre_logits/zarr.json", HEAD_KEY
    }  # fmt: skip
    for place in (path, stage(path, cache)):
        assert verify_store(place).ok
        assert np.array_equal(open_store(place).head, HEAD)
    ensure_store(path, replace(wanted, head=None), made.samples)  # a recipe that does not need it keeps it
    assert folder_bytes(path) == after


def test_other_head_is_a_mismatch(made):
    wanted = replace(made.manifest, head=head_record(HEAD + 1))
    with pytest.raises(FingerprintMismatch, match="head.sha256"):
        ensure_store(made.path, wanted, made.samples, head=HEAD + 1)
    with pytest.raises(StoreError, match="would not have the head that its manifest records"):
        create_store(made.path.with_name("b.zarr"), made.manifest, made.samples)


def test_head_must_fit_the_embeddings(tmp_path):
    specs = (*SPECS[1:], ArraySpec("features/pre_logits", (7,), "float16"))
    with pytest.raises(StoreError, match="its head of 5 features is not that of its embeddings"):
        make_store(tmp_path / "a.zarr", specs=specs, head=HEAD)
