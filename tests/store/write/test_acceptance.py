"""What a writer accepts, every reader accepts; the rest is refused before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_store import SPECS, make_store

from kdpipe.store import ArraySpec, Manifest, StoreError, StoreLayout, create_store, ensure_store, open_store
from kdpipe.store.check.verify import verify_store
from kdpipe.store.write.acceptance import require_readable

LOGITS = SPECS[0]

names = st.one_of(
    st.just("features/zarr.json"),
    st.from_regex(r"(features|pooled|gram-2x3|other)/[A-Za-z0-9_. /-]{1,12}", fullmatch=True),
    st.integers(190, 260).map(lambda length: "pooled/" + "x" * length),
)
specs = st.builds(
    ArraySpec,
    names,
    st.lists(st.integers(0, 3), max_size=9).map(tuple),
    st.sampled_from(["float16", "float32", "float64", "uint8"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(more=st.lists(specs, max_size=3, unique_by=lambda spec: spec.name), num_views=st.integers(0, 2))
def test_what_is_accepted_opens_and_is_whole(tmp_path, more, num_views):
    path = tmp_path / "a.zarr"
    shutil.rmtree(path, ignore_errors=True)
    try:
        made = make_store(path, num_views, 3, specs=(LOGITS, *more))
    except (StoreError, ZeroDivisionError, OverflowError):
        assert not path.exists()
        return
    assert verify_store(path).ok
    store = open_store(path)
    for name, values in made.contents.items():
        assert np.array_equal(store.read_view(name, 0), values[0])


REFUSED = {
    "spaces": ([ArraySpec("features/my layer", (2,), "float16")], "array 'features/my layer' is"),
    "a long name": ([ArraySpec("pooled/" + "x" * 201, (2,), "float16")], "array 'pooled/xxx"),
    "a file's name": (
        [ArraySpec("features/zarr.json", (2,), "float16")],
        "the name of an array and of a metadata file",
    ),
    "many arrays": (
        [ArraySpec(f"pooled/layer{i}", (2,), "float16") for i in range(120)],
        "arrays need markers",
    ),
    "a large row": ([ArraySpec("gram/a", (2**20, 2**10), "float16")], "too many for its arrays"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_readers_refuse_is_not_written(made, tmp_path, case):
    more, wanted = REFUSED[case]
    manifest = replace(made.manifest, arrays=(LOGITS, *more))
    for write in (
        lambda: create_store(tmp_path / "new.zarr", manifest, made.samples),
        lambda: ensure_store(made.path, manifest, made.samples),
    ):
        with pytest.raises(StoreError, match=f"would be refused by every reader: .*{wanted}"):
            write()
    assert not (tmp_path / "new.zarr").exists()
    assert verify_store(made.path).ok


def test_views_classes_and_samples_are_checked(made, tmp_path):
    def refused(wanted: str, manifest: Manifest, samples=made.samples) -> None:
        with pytest.raises(StoreError, match=wanted):
            create_store(tmp_path / "new.zarr", manifest, samples)

    plain, identity = made.manifest, made.manifest.identity
    refused("views of .* shards are too many", replace(plain, layout=StoreLayout(2**20 + 1, 512, (2500,))))
    many = {**identity.data, "classes": ["x" * 100] * 200_000}
    refused("zarr.json needs", replace(plain, identity=replace(identity, data=many)))
    refused("not JSON", replace(plain, identity=replace(identity, teacher={"scale": float("nan")})))
    ids = made.samples.ids.copy()
    ids[0] = ids[1]
    refused("two samples have one id", plain, replace(made.samples, ids=ids))
    ids[0] = -1
    refused("the sample id -1 is negative", plain, replace(made.samples, ids=ids))
    refused("not those that its manifest", plain, made.samples.take(np.arange(9)))


def test_many_arrays_have_room_in_a_marker(made):
    layers = [ArraySpec(f"features/layer3.{i}", (4, 4, 4), "float16") for i in range(85)]
    require_readable(replace(made.manifest, arrays=(LOGITS, *layers)), "it")
