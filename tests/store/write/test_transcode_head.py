"""Stores of pooled vectors and a head are transcoded to logits, narrowed, and made of no others."""

import numpy as np
import pytest
from support.made_store import make_store
from support.transcoded import changed

from kdpipe.store import ArraySpec, StoreError, TranscodeOptions, measure_dense, open_store
from kdpipe.store.check.verify import verify_store
from kdpipe.store.format.encodings.head import head_logits

HEAD = np.random.default_rng(3).standard_normal((10, 7)).astype(np.float32)
SPECS = (ArraySpec("features/pre_logits", (6,), "float32"), ArraySpec("pooled/layer2", (3,), "float32"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("head") / "source.zarr", num_samples=700, specs=SPECS, head=HEAD)


def exact(source, view, ids):
    positions = source.samples.positions_of(ids)
    vectors = source.contents["features/pre_logits"][view, positions]
    return (vectors.astype(np.float64) @ HEAD[:, :6].T + HEAD[:, 6]).astype(np.float32)


def test_logits_follow_from_vectors_and_head(source):
    store = open_store(source.path)
    ids = store.samples.ids[:99]
    assert store.num_classes == 10 and store.manifest.has_logits
    for view in range(2):
        assert np.array_equal(store.logits(view, ids, temperature=4.0), exact(source, view, ids))


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_head_to_dense_stores_the_logits(source, dtype):
    store = open_store(changed(source.path, TranscodeOptions(encoding="dense", dtype=dtype), f"dense-{dtype}.zarr"))
    ids = store.samples.ids[:99]
    assert np.array_equal(store.gather("logits", 1, ids), exact(source, 1, ids).astype(dtype or "float32"))
    assert np.array_equal(store.logits(1, ids), store.gather("logits", 1, ids).astype(np.float32))
    assert [spec.name for spec in store.arrays] == ["logits", "features/pre_logits", "pooled/layer2"]
    assert store.fidelity["logits, step 2"]["num_rows"] == 1400
    assert verify_store(store.path).ok


@pytest.mark.parametrize(
    ("options", "arrays"),
    [
        (TranscodeOptions(top_k=4, arrays=()), {"logits/packed"}),
        (TranscodeOptions(encoding="int8", arrays=("pooled/layer2",)), {"logits/packed", "pooled/layer2"}),
        (TranscodeOptions(arrays=()), {"features/pre_logits"}),
        (TranscodeOptions(encoding="head", num_views=1), {"features/pre_logits", "pooled/layer2"}),
    ],
    ids=["top-k", "int8", "logits only", "head"],
)
def test_arrays_are_those_of_the_encoding(source, options, arrays, tmp_path):
    target = tmp_path / "target.zarr"
    store = open_store(changed(source.path, options, str(target)))
    assert {spec.name for spec in store.arrays} == arrays
    assert np.array_equal(store.head, HEAD)
    ids = store.samples.ids[:9]
    assert np.abs(store.logits(0, ids) - exact(source, 0, ids)).max() < 10


def test_narrower_vectors_have_the_loss_of_their_logits(source):
    store = open_store(changed(source.path, TranscodeOptions(dtype="float16"), "narrow.zarr"))
    vectors = source.contents["features/pre_logits"]
    logits = [head_logits(one.reshape(-1, 6), HEAD) for one in (vectors, vectors.astype(np.float16))]
    figures = store.fidelity["logits, step 2"]
    assert figures["largest_error"] == measure_dense(*logits)["largest_error"] > 0
    assert figures["kl"]["1"] < 1e-5


def test_logits_beside_vectors_and_head_may_be_left_out(source):
    dense = changed(source.path, TranscodeOptions(encoding="int4"), "both.zarr")
    store = open_store(changed(dense, TranscodeOptions(encoding="head"), "again.zarr"))
    ids = store.samples.ids[:99]
    assert [spec.name for spec in store.arrays] == ["features/pre_logits", "pooled/layer2"]
    assert np.array_equal(store.logits(1, ids), exact(source, 1, ids))
    assert store.fidelity["logits, step 3"]["largest_error"] > 0  # against four bits a class


def test_head_is_made_of_no_logits(tmp_path):
    dense = make_store(tmp_path / "a.zarr", num_samples=300, specs=(ArraySpec("logits", (10,), "float32"),))
    with pytest.raises(StoreError, match="the vectors before the teacher's last layer cannot be made: cache with"):
        changed(dense.path, TranscodeOptions(encoding="head"))
