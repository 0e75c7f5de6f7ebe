"""LMDB databases hold the same samples as tar files; pickles and unknown layouts are refused."""

import builtins
import io
import os
import pickle

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.data.sources.packed import lmdb as source
from kdpipe.stages.errors import DataError


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write(path, entries, **keys):
    with lmdb.open(str(path), map_size=2**24, **keys) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


def entries(names, first=0):
    found = {f"{name}.png": png(first + number) for number, name in enumerate(names)}
    return found | {f"{name}.cls": name[0].encode() for name in names}


def load(place, split="train", **keys):
    return load_dataset(DataConfig(name=f"lmdb:{place}", **keys), split)


def test_databases_of_both_splits_are_read_in_workers(tmp_path):
    write(tmp_path / "train.lmdb", entries(["b/2", "a/1", "a/3"]))
    write(tmp_path / "val.lmdb", entries(["a/9"], 9), subdir=False)
    train, test = load(tmp_path, cache_bytes=0), load(tmp_path, "test")
    assert train.sample_ids.tolist() == [sample_id(f"{key}.png") for key in ("a/1", "a/3", "b/2")]
    assert (train.class_names, train.labels.tolist(), test.labels.tolist()) == (("a", "b"), [0, 0, 1], [0])
    want = np.asarray(Image.open(io.BytesIO(png(1)))).transpose(2, 0, 1)
    loader = ImageLoader(train, torch.device("cpu"), num_workers=1)
    assert np.array_equal(loader.get(ViewRequest(torch.tensor([0]))).images[0].numpy(), want)


def test_one_database_is_split(tmp_path):
    place = write(tmp_path / "all", entries([f"{name}/{number}" for name in "ab" for number in range(4)]))
    assert (load(place, test_share=0.25).num_samples, load(place, "test", test_share=0.25).num_samples) == (6, 2)


def test_the_index_is_cached_until_the_database_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = write(tmp_path / "all", entries(["a/1", "a/2", "b/1", "b/2"]))
    os.utime(place / "data.mdb", (1, 1))
    monkeypatch.setattr("kdpipe.stages.data.scan_cache.is_settled", lambda found, now_ns: True)
    first = load(place, test_share=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(source, "_entries", None)
        again = load(place, test_share=0.5)
    assert torch.equal(first.sample_ids, again.sample_ids) and torch.equal(first.images, again.images)
    source._ENVIRONMENTS.pop(str(place)).close()
    write(place, entries(["a/3", "b/3"], 4))
    assert load(place, test_share=0.5).num_samples + load(place, "test", test_share=0.5).num_samples == 6


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refusal(place):
        with pytest.raises(DataError) as caught:
            load(place)
        return str(caught.value)

    pickled = {"__len__": pickle.dumps(2), "000": pickle.dumps((b"x", 1))}
    assert "pickled entries of other layouts are never loaded" in refusal(write(tmp_path / "pickled", pickled))
    assert "must have one image, found none" in refusal(write(tmp_path / "half", {"a.cls": b"x"}))
    assert "no LMDB database" in refusal(tmp_path / "missing")
    (tmp_path / "damaged").write_bytes(b"x" * 9000)
    assert "damaged cannot be read as an LMDB database" in refusal(tmp_path / "damaged")
    real = builtins.__import__

    def without(name, *arguments, **keys):
        if name == "lmdb":
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(source, "_ENVIRONMENTS", {})
    assert "pip install 'kdpipe[lmdb]'" in refusal(tmp_path / "half")
