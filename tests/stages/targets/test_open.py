from __future__ import annotations

from pathlib import Path

import pytest
from support.made_store import make_store

from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.open import open_store_anywhere
from kdpipe.store import Codec, StoreError


def test_a_store_is_opened_by_str_path_or_url(tmp_path, monkeypatch):
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    made, events = make_store(tmp_path / "made.zarr"), []
    for place in (str(made.path), made.path, made.path.as_uri()):
        store = open_store_anywhere(place, RunMonitor(events.append))
        assert store.read_mode("logits").mode == "mapped"
        assert (store.array("logits") == made.contents["logits"]).all()
    assert {event.stage for event in events} == {"stage"}
    assert Path(store.path).is_relative_to(tmp_path / "cache")


def test_an_archive_is_unpacked_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    made = make_store(tmp_path / "made.zarr", codec=Codec("zstd", 3))
    assert open_store_anywhere(made.path).read_mode("logits").mode == "mapped"


def test_a_place_without_a_store_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*nothing.zarr"):
        open_store_anywhere(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="is not a store: it has no zarr.json"):
        open_store_anywhere(str(tmp_path))
