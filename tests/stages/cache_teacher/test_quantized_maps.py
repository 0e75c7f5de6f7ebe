"""A store with feature maps of 8 bits: cached, read wherever it resides, checked, transcoded and grown."""

import dataclasses

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, TEACHER, VIEWS, make_tiny_store, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import FingerprintMismatch, StoreError, TranscodeOptions, open_store, transcode
from kdpipe.store.check.verify import verify_store

INT8 = dataclasses.replace(CACHE, dtype="float32", feature_dtype="int8")
MAPS, POOLED = FeatureSpec("stage2"), FeatureSpec("stage2", "pooled")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    context = tiny_context(folder)
    make_tiny_store(context)
    teacher = load_teacher(TEACHER, 0, context)
    for name, config in {"int8.zarr": INT8, "exact.zarr": dataclasses.replace(CACHE, dtype="float32")}.items():
        cache_teacher(config, folder / name, teacher, LAYERS, context)
    return folder


def test_maps_are_stored_in_half_the_bytes_with_their_error(run):
    store, exact = open_store(run / "int8.zarr"), open_store(run / "exact.zarr")
    assert [(one.name, one.row_shape, one.dtype) for one in store.arrays] == [
        ("logits", (4,), "float32"),
        ("features/stage2", (16, 4, 4), "uint8"),
        ("range/stage2", (2, 16), "float16"),
    ]
    ids = store.samples.ids
    found, wanted = (one.features("features/stage2", 1, ids) for one in (store, exact))
    relative = np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())
    assert store.fidelity["features/stage2"]["relative_rms"] == pytest.approx(relative, rel=0.2)
    assert 1e-4 < relative < 5e-3
    assert store.layers == ("stage2",)
    assert verify_store(store.path).ok


@pytest.mark.parametrize("residence", ["memory", "mapped", "streamed"])
def test_rows_are_decoded_wherever_they_reside(run, residence):
    context, store = tiny_context(run), open_store(run / "int8.zarr")
    config = {
        "memory": TargetLoadingConfig(device_bytes=0),
        "mapped": TargetLoadingConfig(device_bytes=0, memory_bytes=0),
        "streamed": TargetLoadingConfig(device_bytes=0, memory_bytes=0, mapped_bytes=0),
    }[residence]
    targets = Targets([join(store, context.train_set, [MAPS, POOLED])], DEVICE, config)
    assert targets.residence == residence
    rows = torch.arange(40, 0, -3)
    (outputs,) = targets.batch(1, rows)
    wanted = torch.from_numpy(store.features("features/stage2", 1, context.train_set.sample_ids[rows].numpy()))
    assert torch.allclose(outputs.features[MAPS].cpu(), wanted, rtol=1e-6)
    assert torch.allclose(outputs.features[POOLED].cpu(), wanted.mean((2, 3)), rtol=1e-5)
    assert torch.equal(targets.features(0, 1, rows, [MAPS])[MAPS], outputs.features[MAPS])


def test_transcoding_gives_the_store_that_was_cached(run, tmp_path):
    eight, back = tmp_path / "eight.zarr", tmp_path / "back.zarr"
    transcode(run / "exact.zarr", eight, TranscodeOptions(feature_dtype="int8"))
    made, cached = open_store(eight), open_store(run / "int8.zarr")
    assert made.manifest.arrays == cached.manifest.arrays
    for view in range(VIEWS.num_views):
        for spec in made.arrays:
            ids = cached.samples.ids
            assert np.array_equal(made.gather(spec.name, view, ids), cached.gather(spec.name, view, ids))
    assert made.fidelity["features/stage2, step 2"]["relative_rms"] > 0
    transcode(eight, back, TranscodeOptions(feature_dtype="float16", arrays=("features/stage2",)))
    store = open_store(back)
    assert [spec.name for spec in store.arrays] == ["logits", "features/stage2"]
    decoded = made.features("features/stage2", 2, ids).astype(np.float16)
    assert np.array_equal(store.gather("features/stage2", 2, ids), decoded)
    transcode(eight, tmp_path / "copy.zarr", TranscodeOptions())
    assert folder_bytes(tmp_path / "copy.zarr" / "features") == folder_bytes(eight / "features")


def test_conversions_that_change_nothing_are_refused(run, tmp_path):
    for name, dtype, why in [
        ("int8.zarr", "int8", "has no feature maps in float that"),
        ("exact.zarr", "float16", "has no feature maps in int8"),
        ("exact.zarr", "int4", "cannot be converted to 'int4'"),
    ]:
        with pytest.raises(StoreError, match=why):
            transcode(run / name, tmp_path / "target.zarr", TranscodeOptions(feature_dtype=dtype))


def test_a_store_grows_in_its_own_type_only(run, tmp_path):
    context, teacher, path = tiny_context(run), load_teacher(TEACHER, 0, tiny_context(run)), tmp_path / "a.zarr"
    cache_teacher(INT8, path, teacher, [], context)
    cache_teacher(INT8, path, teacher, LAYERS, context)
    whole = open_store(run / "int8.zarr")
    for name in ("features/stage2", "range/stage2"):
        ids = whole.samples.ids
        assert np.array_equal(open_store(path).gather(name, 2, ids), whole.gather(name, 2, ids))
    with pytest.raises(FingerprintMismatch, match=r"arrays.features/stage2.dtype: stored 'uint8', wanted 'float32'"):
        cache_teacher(dataclasses.replace(CACHE, dtype="float32"), path, teacher, LAYERS, context)
