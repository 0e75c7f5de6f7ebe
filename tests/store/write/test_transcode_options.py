"""Impossible transcodings are refused in a sentence and leave nothing incomplete."""

import os

import numpy as np
import pytest
from support.made_store import folder_bytes, make_store
from support.transcoded import BLOSC, FEATURES, FLOAT32, ZSTD, changed, read_arrays

from kdpipe.store import (
    ArraySpec,
    FingerprintMismatch,
    LockedError,
    StoreError,
    claim,
    missing_units,
    open_store,
    read_store_manifest,
    write_unit,
)
from kdpipe.store.format.shard import shard_path
from kdpipe.store.write.transcode import transcode
from kdpipe.store.write.transcode_options import TranscodeOptions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (TranscodeOptions(top_k=10), "k is 10 of 10 classes"),
        (TranscodeOptions(top_k=0), "k is 0 of 10 classes"),
        (TranscodeOptions(top_k=3, temperatures=(4.0, 2.0)), "must ascend"),
        (TranscodeOptions(temperatures=(1.0, 2.0)), "temperatures apply to top-k logits"),
        (TranscodeOptions(encoding="int2"), "cannot be stored as 'int2'; choose from int8, int4, dense"),
        (TranscodeOptions(encoding="int8", top_k=3), "encoding and top_k each say"),
        (TranscodeOptions(sampled_labels=10), "k is 10 of 10 classes"),
        (TranscodeOptions(dtype="bfloat16"), "cannot be converted to 'bfloat16'"),
        (TranscodeOptions(num_views=3), "has 2 views, so 3 of them"),
        (TranscodeOptions(num_views=0), "has 2 views, so 0 of them"),
        (
            TranscodeOptions(arrays=("features/layer2.1",)),
            r"no array 'features/layer2.1'; did you mean 'features/layer2.0'",
        ),
        (TranscodeOptions(keep_bits=0), "keep_bits is 0"),
        (TranscodeOptions(keep_bits=23), "choose from 1 to 22"),
    ],
)
def test_impossible_options_are_refused(source, change, message):
    with pytest.raises(StoreError, match=message):
        changed(source.path, change)
    assert not source.path.with_name("target.zarr").exists()


def test_lost_precision_and_classes_cannot_be_restored(source):
    half = changed(source.path, TranscodeOptions(dtype="float16"), "half.zarr")
    with pytest.raises(StoreError, match="logits of .* is float16, which float32 would not make more precise"):
        changed(half, TranscodeOptions(dtype="float32"))
    with pytest.raises(StoreError, match="would not make more precise"):
        changed(half, TranscodeOptions(top_k=3, dtype="float32"))
    top = changed(source.path, TranscodeOptions(top_k=4), "top.zarr")
    for k in (3, 4, 5):
        with pytest.raises(StoreError, match="has the 4 largest of 10, .* of which no top-k logits can"):
            changed(top, TranscodeOptions(top_k=k))
    sampled = changed(source.path, TranscodeOptions(sampled_labels=4), "sampled.zarr")
    for made, what in ((top, "the 4 largest of 10"), (sampled, "4 of 10 classes sampled")):
        with pytest.raises(StoreError, match=f"has {what}, .* of which no int8 logits can be made"):
            changed(made, TranscodeOptions(encoding="int8"))
        assert list(read_arrays(changed(made, TranscodeOptions(codec=ZSTD), f"{made.name}.zst"))) == list(
            read_arrays(made)
        )


def too_large(source, value):
    """Return two samples of the source, with features set to `value`."""
    unit, rows = source.units[1], source.rows(source.units[1])
    rows[FEATURES][[4, 9], 1, 2] = value
    shard_path(source.path, FLOAT32[1], unit).unlink()
    write_unit(source.path, source.manifest, unit, rows)
    return sorted(source.samples.ids[unit.start + np.array([4, 9])].tolist())


def test_float16_overflow_names_samples(source):
    ids = too_large(source, -1e6)
    with pytest.raises(
        StoreError, match=r"of 2 samples in view 0, .*for float16 .*neither dtype nor keep_bits, and it stays"
    ) as caught:
        changed(source.path, TranscodeOptions(dtype="float16"))
    assert all(str(one) in str(caught.value) for one in ids)
    assert FEATURES in str(caught.value)
    assert np.array_equal(
        read_arrays(changed(source.path, TranscodeOptions(codec=ZSTD), "b.zarr"))[FEATURES], source.contents[FEATURES]
    )


def test_rounding_to_infinity_is_refused(source):
    too_large(source, np.finfo(np.float32).max)
    with pytest.raises(StoreError, match="too large for float32 rounded to 5 bits .*neither dtype nor keep_bits"):
        changed(source.path, TranscodeOptions(keep_bits=5))


def test_a_store_is_not_transcoded_onto_or_into_itself(source):
    link = source.path.with_name("link.zarr")
    link.symlink_to(source.path)
    before = folder_bytes(source.path)
    for target in (source.path, link, source.path.parent / "x" / ".." / source.path.name):
        with pytest.raises(StoreError, match="is the source itself"):
            transcode(source.path, target, TranscodeOptions(codec=ZSTD))
        with pytest.raises(StoreError, match="is the source itself"):
            transcode(target, source.path, TranscodeOptions(codec=ZSTD))
    for target in (source.path / "inner.zarr", link / "logits" / "inner.zarr", source.path.parent):
        with pytest.raises(StoreError, match="one within the other"):
            transcode(source.path, target, TranscodeOptions())
    assert folder_bytes(source.path) == before


def test_an_incomplete_source_is_refused(store_maker):
    made = store_maker(fill=False)
    made.fill(made.units[:-1])
    with pytest.raises(StoreError, match=f"not complete: {made.units[-1]} is missing"):
        changed(made.path, TranscodeOptions())
    with pytest.raises(StoreError, match="no store at"):
        changed(made.path.with_name("none.zarr"), TranscodeOptions())


def test_damaged_shard_stops_transcode_and_repaired_it_continues(source):
    file = shard_path(source.path, FLOAT32[1], source.units[2])
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreError, match=r"features/layer2.0.*\(view 0, shard 2\) is damaged"):
        changed(source.path, TranscodeOptions(top_k=8))
    target = source.path.with_name("target.zarr")
    assert missing_units(target, read_store_manifest(target)) == source.units[2:]
    file.write_bytes(whole)
    assert folder_bytes(changed(source.path, TranscodeOptions(top_k=8))) == folder_bytes(
        changed(source.path, TranscodeOptions(top_k=8), "b.zarr")
    )


def test_another_store_at_target_is_refused(source):
    target = changed(source.path, TranscodeOptions(codec=ZSTD))
    before = folder_bytes(target)
    with pytest.raises(FingerprintMismatch, match=r"codec\.name: stored 'zstd', wanted 'blosc'.*Give another target"):
        transcode(source.path, target, TranscodeOptions(codec=BLOSC))
    other = make_store(source.path.with_name("other.zarr"), num_samples=2400, specs=FLOAT32)
    with pytest.raises(FingerprintMismatch):
        transcode(other.path, target, TranscodeOptions(codec=ZSTD))
    assert folder_bytes(target) == before
    (source.path.parent / "folder").mkdir()
    with pytest.raises(StoreError, match="is not a store"):
        transcode(source.path, source.path.parent / "folder", TranscodeOptions())


def test_two_do_not_transcode_to_one_target(source):
    target = source.path.with_name("b.zarr")
    taken = claim(target, "transcode")
    with pytest.raises(LockedError, match=f"in use by process {os.getpid()}"):
        transcode(source.path, target, TranscodeOptions())
    taken.release()
    assert transcode(source.path, target, TranscodeOptions())["complete"]


def test_a_store_of_embeddings_keeps_them_and_has_no_top_k(tmp_path):
    specs = (ArraySpec("features/pre_logits", (12,), "float32"), ArraySpec("pooled/layer1", (3,), "float32"))
    made = make_store(tmp_path / "made.zarr", num_samples=200, specs=specs)
    transcode(made.path, tmp_path / "half.zarr", TranscodeOptions(dtype="float16", arrays=()))
    half = open_store(tmp_path / "half.zarr")
    assert [(spec.name, spec.dtype) for spec in half.arrays] == [("features/pre_logits", "float16")]
    assert (half.num_classes, half.manifest.has_logits) == (0, False)
    with pytest.raises(StoreError, match="has embeddings, no logits: leave out top_k"):
        transcode(made.path, tmp_path / "top.zarr", TranscodeOptions(top_k=3))


def test_a_store_with_neither_logits_nor_embeddings_is_refused(tmp_path):
    with pytest.raises(StoreError, match="it has no array of logits"):
        make_store(tmp_path / "made.zarr", num_samples=200, specs=(ArraySpec("pooled/a", (3,), "float32"),))
