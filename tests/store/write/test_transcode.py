"""Transcoding is exact where no loss is requested, and reports the loss where it is."""

import os
import random
import signal
import traceback
import warnings
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_store import folder_bytes, make_store
from support.transcoded import BLOSC, FEATURES, FLOAT32, ZSTD, changed, read_arrays

from kdpipe.store import (
    ArraySpec,
    Samples,
    StoreError,
    TopK,
    default_temperatures,
    encode_topk,
    ensure_store,
    finish_store,
    measure_dense,
    measure_features,
    missing_units,
    open_store,
    read_store_manifest,
    write_unit,
)
from kdpipe.store.format.encodings.encoding_error import merge, summarize_features, summarize_logits
from kdpipe.store.format.encodings.quantized import Quantized
from kdpipe.store.format.encodings.sampled import Sampled
from kdpipe.store.format.shard import shard_path
from kdpipe.store.write.transcode import transcode
from kdpipe.store.write.transcode_options import TranscodeOptions


def nearest(values, bits):
    """Return `values` rounded to `bits` bits behind the leading one, in double precision; ties to even."""
    exact = values.astype(np.float64)
    mantissa, exponent = np.frexp(exact)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)


@pytest.mark.parametrize("codec", [ZSTD, BLOSC], ids=lambda codec: codec.name)
def test_compression_round_trip_gives_identical_bytes(made, codec):
    packed = changed(made.path, TranscodeOptions(codec=codec), "packed.zarr")
    assert open_store(packed).manifest.profile == "archive"
    assert {name: values.tobytes() for name, values in read_arrays(packed).items()} == {
        name: values.tobytes() for name, values in made.contents.items()
    }
    unpacked = changed(packed, TranscodeOptions(codec="zero-copy"), "unpacked.zarr")
    assert folder_bytes(unpacked) == folder_bytes(made.path)
    assert folder_bytes(changed(packed, TranscodeOptions(), "copy.zarr")) == folder_bytes(packed)


def test_plain_zarr_reads_every_array_of_a_transcoded_archive(source):
    target = changed(source.path, TranscodeOptions(top_k=4, dtype="float16", keep_bits=6, codec=BLOSC))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(target, mode="r")
        for name, values in read_arrays(target).items():
            assert np.array_equal(group[name][:], values)
        assert np.array_equal(group["samples/ids"][:], source.samples.ids)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("k", [3, 4])
def test_top_k_logits_are_those_of_the_dense_rows(source, dtype, k):
    target = changed(source.path, TranscodeOptions(top_k=k, dtype=dtype))
    form = TopK(10, k, default_temperatures(), dtype or "float32")
    found, store = read_arrays(target), open_store(target)
    for view in range(2):
        expected = form.encode(source.contents["logits"][view], "float16", source.samples.ids, view)
        for name, rows in expected.items():
            assert np.array_equal(found[name][view][:2500], rows)
    assert np.array_equal(found[FEATURES], source.contents[FEATURES].astype(dtype or "float32"))
    assert store.manifest.top_k == form
    assert store.manifest.identity == source.manifest.identity
    assert {store.read_mode(name).mode for name in found} == {"mapped"}
    full_pages = {(3, None): 2048, (3, "float16"): 2048, (4, None): 2048, (4, "float16"): 2048}
    assert store.unit_rows == full_pages[k, dtype] >= source.manifest.layout.unit_rows
    mapped = store.gather("logits/packed", 1, source.samples.ids[[2499, 0, 1500]])
    assert np.array_equal(mapped, found["logits/packed"][1][[2499, 0, 1500]])


def test_older_top_k_logits_become_packed_rows(source):
    form = TopK(10, 4, default_temperatures(), None)
    parts = [encode_topk(source.contents["logits"][view], form, "float32") for view in range(2)]
    contents = {name: np.stack([one[name] for one in parts]) for name in parts[0]}
    specs = (*form.arrays("float32"), *FLOAT32[1:])
    manifest = replace(source.manifest, encoding=form, arrays=specs)
    contents[FEATURES] = source.contents[FEATURES]
    older = replace(source, path=source.path.with_name("older.zarr"), manifest=manifest, contents=contents)
    ensure_store(older.path, manifest, source.samples)
    older.fill(older.units)
    finish_store(older.path)
    store = open_store(changed(older.path, TranscodeOptions(), "newer.zarr"))
    at_once = open_store(changed(source.path, TranscodeOptions(top_k=4), "at_once.zarr"))
    assert store.manifest.arrays == at_once.manifest.arrays
    assert folder_bytes(store.path / "logits") == folder_bytes(at_once.path / "logits")
    assert "logits, step 2" not in store.fidelity


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        ({"encoding": "int8"}, Quantized("int8", 10)),
        ({"encoding": "int4"}, Quantized("int4", 10)),
        ({"sampled_labels": 3}, Sampled(10, 3, seed=3)),
    ],
)
@pytest.mark.parametrize("codec", ["keep", ZSTD])
def test_encoded_logits_are_those_of_the_dense_rows(source, options, encoding, codec):
    target = changed(source.path, TranscodeOptions(**options, codec=codec))
    found, store, ids = read_arrays(target), open_store(target), source.samples.ids
    assert store.manifest.encoding == encoding
    for view in range(2):
        for name, rows in encoding.encode(source.contents["logits"][view], "float32", ids, view).items():
            assert np.array_equal(found[name][view][:2500], rows)
    assert np.array_equal(found[FEATURES], source.contents[FEATURES])
    assert store.fidelity["logits, step 2"]["num_rows"] == 5000
    if codec == "keep":
        assert {store.read_mode(name).mode for name in found} == {"mapped"}


@pytest.mark.parametrize("onward", [{"encoding": "dense"}, {"encoding": "int4"}, {"top_k": 4}, {"sampled_labels": 4}])
def test_quantized_logits_are_transcoded_further(source, onward):
    packed = changed(source.path, TranscodeOptions(encoding="int8"), "packed.zarr")
    decoded = np.stack([open_store(packed).logits(view, source.samples.ids) for view in range(2)])
    assert np.abs(decoded - source.contents["logits"]).max() < 0.02
    again = changed(packed, TranscodeOptions(**onward), "again.zarr")
    store = open_store(again)
    if onward == {"encoding": "dense"}:
        assert np.array_equal(read_arrays(again)["logits"], decoded.astype(np.float16))
    else:
        for name, rows in store.manifest.encoding.encode(decoded[1], "float16", source.samples.ids, 1).items():
            assert np.array_equal(store.gather(name, 1, source.samples.ids), rows)
    assert set(store.fidelity) == {"logits, step 2", "logits, step 3"}


def test_a_grid_of_temperatures_may_be_chosen(source):
    target = changed(source.path, TranscodeOptions(top_k=4, temperatures=(1.0, 2.0, 4.0)))
    assert open_store(target).manifest.top_k == TopK(10, 4, (1.0, 2.0, 4.0), "float32")
    assert read_arrays(target)["logits/packed"].shape == (2, 2500, 4 * 4 + 3 * 2 + 2)


def test_numbers_digest_depends_on_the_temperature_grid(source):
    names = ["logits/packed"]
    grids = {"low.zarr": (1.0, 2.0, 4.0), "high.zarr": (1.0, 3.0, 9.0)}
    made = [changed(source.path, TranscodeOptions(top_k=4, temperatures=grid), name) for name, grid in grids.items()]
    digests = {open_store(path).manifest.numbers_sha256(names) for path in made}
    assert len(digests) == 2
    assert open_store(made[0]).manifest.numbers_sha256([FEATURES]) == source.manifest.numbers_sha256([FEATURES])


def test_float32_narrows_to_float16(source):
    found = read_arrays(changed(source.path, TranscodeOptions(dtype="float16")))
    for name, values in source.contents.items():
        assert found[name].dtype == np.float16
        assert np.array_equal(found[name], values.astype(np.float16))


def test_views_and_arrays_may_be_left_behind(source):
    target = changed(source.path, TranscodeOptions(num_views=1, arrays=()))
    assert open_store(target).num_views == 1
    found = read_arrays(target)
    assert list(found) == ["logits"]
    assert np.array_equal(found["logits"], source.contents["logits"][:1])
    assert not (target / "features").exists()
    both = changed(source.path, TranscodeOptions(arrays=(FEATURES,)), "both.zarr")
    assert list(read_arrays(both)) == ["logits", FEATURES]


def test_rounded_arrays_keep_their_bits_and_compress_better(source):
    plain = transcode(source.path, source.path.with_name("plain.zarr"), TranscodeOptions(codec=ZSTD))
    rounded = changed(source.path, TranscodeOptions(codec=ZSTD, keep_bits=6))
    for name, values in read_arrays(rounded).items():
        assert np.array_equal(values.astype(np.float64), nearest(source.contents[name], 6))
    manifest = open_store(rounded).manifest
    assert manifest.rounded == {"logits": 6, FEATURES: 6}
    again = transcode(rounded, source.path.with_name("again.zarr"), TranscodeOptions())
    assert again["bytes_before"] < plain["bytes_after"] / 2
    assert manifest.numbers_sha256(["logits"]) != source.manifest.numbers_sha256(["logits"])


def test_rounding_skips_tail_and_coarser_arrays_and_is_recorded(tmp_path):
    specs = (ArraySpec("logits", (10,), "float16"), FLOAT32[1])
    made = make_store(tmp_path / "mixed.zarr", specs=specs)
    once = changed(made.path, TranscodeOptions(keep_bits=12), "once.zarr")
    assert open_store(once).manifest.rounded == {FEATURES: 12}
    assert np.array_equal(read_arrays(once)["logits"], made.contents["logits"])
    twice = changed(once, TranscodeOptions(keep_bits=5), "twice.zarr")
    finer = changed(twice, TranscodeOptions(keep_bits=8), "finer.zarr")
    assert open_store(finer).manifest.rounded == {"logits": 5, FEATURES: 5}
    assert open_store(changed(once, TranscodeOptions(dtype="float16"), "half.zarr")).manifest.rounded == {FEATURES: 10}
    topk = changed(twice, TranscodeOptions(top_k=4), "topk.zarr")
    assert open_store(topk).manifest.rounded == {"logits/packed": 5, FEATURES: 5}
    coarse = changed(topk, TranscodeOptions(keep_bits=3), "coarse.zarr")
    form = open_store(topk).manifest.top_k
    found, before = (form.unpack({"logits/packed": read_arrays(path)["logits/packed"][1]}) for path in (coarse, topk))
    assert np.array_equal(found["logits/tail"], before["logits/tail"])
    assert np.array_equal(found["logits/values"], nearest(before["logits/values"], 3))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_samples=st.integers(1, 3000),
    codec=st.sampled_from(["keep", "zero-copy", ZSTD, BLOSC]),
    dtype=st.sampled_from([None, "float16"]),
    num_views=st.sampled_from([None, 1, 2]),
    keep_bits=st.sampled_from([None, 1, 7]),
    before=st.sampled_from([None, ZSTD]),
)
def test_any_options_give_expected_rows(tmp_path_factory, num_samples, codec, dtype, num_views, keep_bits, before):
    folder = tmp_path_factory.mktemp("any")
    made = make_store(folder / "a.zarr", num_samples=num_samples, specs=FLOAT32, codec=before)
    target = changed(made.path, TranscodeOptions(codec=codec, dtype=dtype, num_views=num_views, keep_bits=keep_bits))
    for name, values in made.contents.items():
        wanted = values[:num_views].astype(dtype or np.float32)
        if keep_bits:  # below float16's normal numbers there are fewer bits to keep
            normal = np.abs(wanted) >= 2.0**-14
            wanted = np.where(normal, nearest(wanted, keep_bits), read_arrays(target)[name])
        assert np.array_equal(read_arrays(target)[name], wanted)


def measured(made):
    """Fill a store as a teacher does, with figures on the loss of each array."""
    for unit in made.units:
        rows = made.rows(unit)
        exact = {name: values.astype(np.float32) * np.float32(1.001) for name, values in rows.items()}
        lost = {
            "logits": measure_dense(exact["logits"], rows["logits"]),
            FEATURES: measure_features(exact[FEATURES], rows[FEATURES]),
        }
        write_unit(made.path, made.manifest, unit, rows, lost)
    finish_store(made.path)
    return open_store(made.path).fidelity


def test_figures_state_their_reference(tmp_path):
    made = make_store(tmp_path / "a.zarr", specs=(FLOAT32[0], ArraySpec(FEATURES, (3, 5), "float16")), fill=False)
    by_teacher = measured(made)
    copied = transcode(made.path, tmp_path / "copy.zarr", TranscodeOptions(codec=ZSTD))
    assert copied["fidelity"] == by_teacher
    half = transcode(made.path, tmp_path / "half.zarr", TranscodeOptions(dtype="float16"))["fidelity"]
    assert sorted(half) == [FEATURES, "logits, step 1", "logits, step 2"]
    assert half[FEATURES] == by_teacher[FEATURES]
    assert half["logits, step 1"] == by_teacher["logits"]
    logits = made.contents["logits"]
    assert half["logits, step 2"]["num_rows"] == 5000
    assert half["logits, step 2"]["largest_error"] == pytest.approx(
        np.abs(logits - logits.astype(np.float16)).max(), rel=1e-5
    )
    third = transcode(tmp_path / "half.zarr", tmp_path / "third.zarr", TranscodeOptions(top_k=3, arrays=()))["fidelity"]
    assert sorted(third) == ["logits, step 1", "logits, step 2", "logits, step 3"]
    assert {name: third[name] for name in half if name in third} == {
        name: figures for name, figures in half.items() if name != FEATURES
    }
    assert third["logits, step 3"]["num_rows"] == 5000
    assert third["logits, step 3"]["kl"]["1"] > half["logits, step 2"]["kl"]["1"]


def test_figures_are_those_of_the_formulas(source):
    target = source.path.with_name("b.zarr")
    found = transcode(source.path, target, TranscodeOptions(dtype="float16", keep_bits=4))["fidelity"]
    parts = {name: [] for name in source.contents}
    for unit in read_store_manifest(target).layout.units():
        for name, exact in source.rows(unit).items():
            stored = read_arrays(target)[name][unit.view, unit.start : unit.stop]
            parts[name].append((measure_dense if name == "logits" else measure_features)(exact, stored))
    assert found == {
        "logits, step 2": summarize_logits(merge(parts["logits"])),
        f"{FEATURES}, step 2": summarize_features(merge(parts[FEATURES])),
    }


def test_sizes_are_those_on_disk(source):
    target = source.path.with_name("b.zarr")
    report = transcode(source.path, target, TranscodeOptions(codec=ZSTD, num_views=1))
    sizes = {
        path: sum(
            shard_path(path, spec, unit).stat().st_size for spec in manifest.arrays for unit in manifest.layout.units()
        )
        for path, manifest in ((source.path, source.manifest), (target, read_store_manifest(target)))
    }
    assert (report["bytes_before"], report["bytes_after"]) == tuple(sizes.values())
    assert (report["complete"], report["num_units"]) == (True, 3)


def killed_at_fsync(number, source, target, change):
    """Run `transcode` in a child that is killed at its `number`-th fsync; return whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            real, left = os.fsync, iter(range(number, -1, -1))

            def fsync(descriptor):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(descriptor)

            os.fsync = fsync
            transcode(source, target, change)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, -signal.SIGKILL}
    return status != 0


@pytest.mark.parametrize(
    "change", [TranscodeOptions(top_k=4, dtype="float16"), TranscodeOptions(codec=ZSTD, keep_bits=7)]
)
def test_kill_at_any_moment_and_rerun_give_identical_bytes(source, change):
    undisturbed = changed(source.path, change, "undisturbed.zarr")
    target, chance, num_kills = source.path.with_name("killed.zarr"), random.Random(5), 0
    while killed_at_fsync(chance.randrange(35), source.path, target, change):
        num_kills += 1
        assert num_kills < 300
    assert num_kills > 5
    assert folder_bytes(target) == folder_bytes(undisturbed)
    assert not list(source.path.parent.glob("*.partial"))
    assert not list(source.path.parent.glob(".*.partial"))


def test_stopped_transcode_continues(source):
    target, seen = source.path.with_name("b.zarr"), []
    stopped = transcode(
        source.path, target, TranscodeOptions(codec=ZSTD), should_stop=lambda: len(seen) == 2 or seen.append(1)
    )
    assert (stopped["complete"], stopped["fidelity"]) == (False, {})
    assert len(missing_units(target, read_store_manifest(target))) == len(source.units) - 2
    with pytest.raises(StoreError, match="not complete"):
        open_store(target)
    first = shard_path(target, source.manifest.arrays[0], source.units[0])
    written = first.stat().st_mtime_ns
    heard = []
    assert transcode(source.path, target, TranscodeOptions(codec=ZSTD), on_unit=lambda *at: heard.append(at))[
        "complete"
    ]
    assert heard == [(done, 6) for done in range(7)]
    assert first.stat().st_mtime_ns == written
    assert folder_bytes(target) == folder_bytes(changed(source.path, TranscodeOptions(codec=ZSTD), "c.zarr"))


def grown_samples(made, num_added):
    ids = np.arange(num_added) + made.samples.ids.max() + 1
    others = Samples(ids, ids % 10, np.arange(num_added, dtype=np.uint32))
    return made.samples.followed_by(others)


def grown_manifest(made, samples):
    data = {**made.manifest.identity.data, **samples.digests(), "num_samples": len(samples.ids)}
    return replace(made.manifest, identity=replace(made.manifest.identity, data=data))


def grow(made, samples, fill):
    """Extend a store by new samples, with random rows, and return its expected contents."""
    manifest = ensure_store(made.path, grown_manifest(made, samples), samples)
    rng = np.random.default_rng(3)
    shape = (2, manifest.layout.num_shards * manifest.layout.unit_rows)
    contents = {spec.name: rng.normal(size=(*shape, *spec.row_shape)).astype("f4") for spec in manifest.arrays}
    for name, values in made.contents.items():
        contents[name][:, :2500] = values
    for unit in missing_units(made.path, manifest) if fill else []:
        rows = {name: values[unit.view, unit.start : unit.stop] for name, values in contents.items()}
        write_unit(made.path, manifest, unit, rows)
    finish_store(made.path)
    return contents


@pytest.mark.parametrize("k", [3, 4])
def test_grown_source_extends_its_target(source, k):
    target = changed(source.path, TranscodeOptions(top_k=k))
    first = read_arrays(target)
    samples = grown_samples(source, 1300)
    contents = grow(source, samples, fill=True)
    transcode(source.path, target, TranscodeOptions(top_k=k))
    store, wide = open_store(target), open_store(source.path)
    assert store.num_samples == wide.num_samples == 3800
    rows = wide.rows_of(samples.ids)
    form = TopK(10, k, default_temperatures(), "float32")
    for view in range(2):
        expected = form.encode(contents["logits"][view][rows], "float32", samples.ids, view)
        for name, values in expected.items():
            assert np.array_equal(store.gather(name, view, samples.ids), values)
            assert np.array_equal(store.read_view(name, view)[:2500], first[name][view])
        assert np.array_equal(store.gather(FEATURES, view, samples.ids), contents[FEATURES][view][rows])
    assert store.manifest.segment_fingerprints == wide.manifest.segment_fingerprints
    at_once = changed(source.path, TranscodeOptions(top_k=k), "at_once.zarr")
    for name, values in read_arrays(at_once).items():
        assert np.array_equal(values, read_arrays(target)[name], equal_nan=values.dtype.kind == "f")


def test_finished_part_of_an_extending_source_is_transcoded(source):
    data = {**source.manifest.identity.data, "num_samples": 2500}
    manifest = replace(source.manifest, identity=replace(source.manifest.identity, data=data))
    path = source.path.with_name("counted.zarr")
    ensure_store(path, manifest, source.samples)
    counted = replace(source, path=path, manifest=manifest)
    counted.fill(counted.units)
    before = changed(path, TranscodeOptions(top_k=4), "before.zarr")
    grow(counted, grown_samples(source, 600), fill=False)
    assert folder_bytes(changed(path, TranscodeOptions(top_k=4), "during.zarr")) == folder_bytes(before)
