"""Views are dropped from the end: the rest is untouched, a kill leaves a valid store, and views can be added again."""

import dataclasses
import os

import numpy as np
import pytest
from support.made_store import folder_bytes, make_store

from kdpipe.store import LockedError, StoreError, claim, ensure_store, missing_units, open_store, read_store_manifest
from kdpipe.store.check.verify import verify_store
from kdpipe.store.write.drop_views import drop_views


class Killed(BaseException):
    pass


@pytest.fixture
def three(tmp_path):
    return make_store(tmp_path / "a.zarr", num_views=3, num_samples=900)


def require_right(three, num_views):
    store = open_store(three.path)
    assert store.num_views == num_views
    for name, values in three.contents.items():
        for view in range(num_views):
            assert np.array_equal(store.read_view(name, view), values[view])


def test_remaining_store_equals_one_made_with_fewer_views(three, tmp_path):
    before = folder_bytes(three.path)
    removed = drop_views(three.path, 1)
    after = folder_bytes(three.path)
    metadata = {key for key in after if key.endswith("zarr.json")}
    num_bytes = sum(len(raw) for key, raw in before.items() if key not in after)
    assert removed == {"path": str(three.path), "num_views": 1, "num_views_removed": 2, "bytes_freed": num_bytes}
    fresh = folder_bytes(make_store(tmp_path / "one.zarr", num_views=1, num_samples=900).path)
    assert set(after) == set(fresh)
    assert {key: after[key] for key in metadata} == {key: fresh[key] for key in metadata}
    require_right(three, 1)
    verdict = verify_store(three.path)
    assert not verdict.damaged


def test_kill_at_any_step_leaves_valid_store_and_rerun_finishes(three, tmp_path, monkeypatch):
    drop_views(three.path, 1)
    wanted = folder_bytes(three.path)
    real_unlink, real_fsync = os.unlink, os.fsync
    for fuse in range(100):
        again = make_store(tmp_path / f"{fuse}.zarr", num_views=3, num_samples=900)
        left = fuse

        def burn(real, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", lambda *args, **kwargs: burn(real_unlink, *args, **kwargs))
            patch.setattr(os, "fsync", lambda *args: burn(real_fsync, *args))
            try:
                drop_views(again.path, 1)
                break
            except Killed:
                pass
        num_views = read_store_manifest(again.path).layout.num_views
        assert num_views in (1, 3)
        require_right(again, num_views)
        assert all("shape" in fault.what for fault in verify_store(again.path).damaged)
        drop_views(again.path, 1)
        assert folder_bytes(again.path) == wanted
    assert fuse > 10, "it was never killed: the test tested nothing"


def test_views_can_be_added_again(three):
    before = folder_bytes(three.path)
    drop_views(three.path, 2)
    ensure_store(three.path, three.manifest, three.samples)
    assert {unit.view for unit in missing_units(three.path, three.manifest)} == {2}
    require_right(three, 2)
    three.fill(missing_units(three.path, three.manifest))
    assert folder_bytes(three.path) == before


def test_a_store_that_is_not_finished_stays_unfinished(store_maker):
    made = store_maker(fill=False)
    made.fill(made.units[1:2])
    drop_views(made.path, 1)
    manifest = read_store_manifest(made.path)
    assert manifest.finished is None
    assert missing_units(made.path, manifest) == [unit for unit in made.units if unit.view == 0 and unit.shard != 1]


def test_unfinished_extension_is_dropped(made):
    before = folder_bytes(made.path)
    layout = dataclasses.replace(made.manifest.layout, num_views=5)
    ensure_store(made.path, dataclasses.replace(made.manifest, layout=layout), made.samples)
    drop_views(made.path, 2)
    assert folder_bytes(made.path) == before


def test_a_reader_keeps_the_views_that_it_has_mapped(three):
    store = open_store(three.path)
    mapped = store.array("logits")
    drop_views(three.path, 1)
    assert np.array_equal(mapped[2], three.contents["logits"][2])


@pytest.mark.parametrize("keep", [0, -1, 4])
def test_too_few_or_too_many_views_are_refused(three, keep):
    before = folder_bytes(three.path)
    with pytest.raises(StoreError, match=f"has 3 views: keep from 1 to 3 of them, not {keep}"):
        drop_views(three.path, keep)
    assert folder_bytes(three.path) == before


def test_claimed_view_is_not_dropped(three):
    at_it = claim(three.path, three.units[-1].key)
    with pytest.raises(LockedError, match="view 2, shard 0 of .* is being computed by process"):
        drop_views(three.path, 1)
    require_right(three, 3)
    at_it.release()
    drop_views(three.path, 1)


def test_a_read_only_store_is_refused_in_one_sentence(three, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # tests may run as root, whom no permission stops
    with pytest.raises(StoreError, match="cannot drop views of .*: it is read-only"):
        drop_views(three.path, 1)
