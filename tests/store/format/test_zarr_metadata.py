"""Metadata that plain Zarr tools read: the axes of arrays."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.made_store import SPECS, folder_bytes

from kdpipe.store import ArraySpec, ensure_store, finish_store, open_store, write_unit
from kdpipe.store.check.verify import verify_store

MORE = ArraySpec("features/pool", (3, 2), "float32")


def test_xarray_opens_layers_of_other_sizes(store_maker):
    made = store_maker(num_samples=40, specs=(*SPECS, MORE))
    names = [
        json.loads((made.path / spec.name / "zarr.json").read_text())["dimension_names"][2:]
        for spec in made.manifest.arrays
    ]
    assert names == [["logits_0"], ["layer2.0_0", "layer2.0_1", "layer2.0_2"], ["pool_0", "pool_1"]]
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(made.path, group="features", consolidated=False)
    assert opened["pool"].dims == ("view", "sample", "pool_0", "pool_1")
    assert np.array_equal(opened["layer2.0"].sel(view=1), made.contents["features/layer2.0"][1])
    assert np.array_equal(opened["pool"], made.contents["features/pool"])


def test_a_store_without_named_axes_is_read_and_extended_as_it_is(store_maker):
    made = store_maker(num_samples=40, named_axes=False)
    before, rng = folder_bytes(made.path), np.random.default_rng(0)
    wanted = replace(made.manifest, arrays=(*made.manifest.arrays, MORE), named_axes=True)
    assert wanted.identity.fingerprint == made.manifest.identity.fingerprint
    grown = ensure_store(made.path, wanted, made.samples)
    for unit in made.units:
        write_unit(made.path, grown, unit, {MORE.name: rng.random((unit.num_rows, 3, 2), np.float32)})
    assert finish_store(made.path)
    assert verify_store(made.path).ok
    assert [spec.name for spec in open_store(made.path).arrays] == ["logits", "features/layer2.0", "features/pool"]
    after = folder_bytes(made.path)
    changed = {key for key in before if before[key] != after[key]}
    assert {key for key in changed if not key.startswith("markers/")} == {"zarr.json"}
    assert json.loads(after["features/pool/zarr.json"])["dimension_names"] == ["view", "sample", None, None]
