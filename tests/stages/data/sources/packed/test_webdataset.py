"""Tar files hold the samples of the folder that they were made of, and damage names the file and member."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from kdpipe.stages.data import scan, scan_cache
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.image_set import pixel_checksums
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources.packed import tar_index
from kdpipe.stages.errors import DataError, RecipeError

SAMPLES = [("cat/a", "cat"), ("dog/b", "dog"), ("cat/c", "cat"), ("dog/d", "dog")]


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def members(samples=SAMPLES, first=0):
    for number, (name, label) in enumerate(samples):
        yield f"{name}.png", png(first + number)
        yield f"{name}.cls", label.encode()


def load(place, split="train", **keys):
    return load_dataset(DataConfig(name=f"webdataset:{place}", **keys), split)


def refusal(place, split="train", **keys):
    with pytest.raises(DataError) as caught:
        load(place, split, **keys)
    return str(caught.value)


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "w" / "x-train-0.tar", [*members(SAMPLES[:2]), ("README", b"hello")])
    write_tar(tmp_path / "w" / "x-train-1.tar", members(SAMPLES[2:], 2))
    write_tar(tmp_path / "w" / "x-val-0.tar", [*members(SAMPLES[1:2], 9)])
    return tmp_path / "w"


def test_samples_are_those_of_the_folder(shards, tmp_path):
    for number, (name, _) in enumerate(SAMPLES):
        file = tmp_path / "train" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    folder = load_dataset(DataConfig(name=f"imagefolder:{tmp_path / 'train'}", test_share=1e-9), "train")
    for keys in ({}, {"cache_bytes": 0}):
        found = load(shards, **keys)
        assert found.in_memory == (not keys)
        assert (found.name, found.class_names, found.num_samples) == ("webdataset:w", ("cat", "dog"), 4)
        rows = torch.isin(found.sample_ids, folder.sample_ids)
        assert found.sample_ids[rows].tolist() == folder.sample_ids.tolist()
        assert found.labels[rows].tolist() == folder.labels.tolist()
        assert pixel_checksums(found)[rows.numpy()].tolist() == pixel_checksums(folder).tolist()
    test = load(shards, "test")
    assert (test.num_samples, test.labels.tolist(), test.class_names) == (1, [1], ("cat", "dog"))
    assert load(shards).notices == ("webdataset:w: the test split is its val split.",)


def test_shards_share_out_samples_as_they_like(shards, tmp_path):
    one = write_tar(tmp_path / "one.tar", list(members())[::-1])
    whole, parts = load(one, test_share=0.5), load(f"{shards}/x-train-{{0..1}}.tar", test_share=0.5)
    assert whole.sample_ids.tolist() == parts.sample_ids.tolist()
    assert torch.equal(whole.images, parts.images)
    assert "test images are split off" in parts.notices[0] and whole.notices == ()


def test_names_that_occur_twice_are_told_apart_by_their_files(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "w" / f"{number}.tar", [*members([("a", "0"), ("b", "1")], 2 * number)])
    found = load(tmp_path / "w", test_share=0.5)
    assert len({*found.sample_ids.tolist(), *load(tmp_path / "w", "test", test_share=0.5).sample_ids.tolist()}) == 4


def test_labels_come_from_json_too(tmp_path):
    samples = [(f"{n}.json", json.dumps({"label": n % 2, "text": "x"}).encode()) for n in range(4)]
    file = write_tar(tmp_path / "a.tar", [*samples, *((f"{n}.png", png(n)) for n in range(4))])
    found = load(file, test_share=0.5)
    assert (found.class_names, sorted(found.labels.tolist())) == (("0", "1"), [0, 1])


def test_images_without_labels_are_unlabeled(tmp_path):
    file = write_tar(tmp_path / "a.tar", [*members(), *((f"{n}.png", png(n)) for n in range(4))])
    found = load(file, test_share=0.4)
    assert (found.class_names, sorted(found.labels.tolist())) == (("cat", "dog"), [-1, -1, 0, 1])
    assert "2 of 4 samples have no label" in found.notices[-1]
    bare = write_tar(tmp_path / "b.tar", [(f"{n}.png", png(n)) for n in range(4)])
    assert "set data.labels = 'none'" in refusal(bare, classes=("x", "y"))
    assert load(bare, labels="none", classes=("x", "y")).labels.tolist() == [-1] * 3


def test_index_and_scan_are_cached_until_a_shard_changes(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "is_settled", lambda *_: True)
    monkeypatch.setattr(scan_cache, "is_settled", lambda *_: True)
    first = load(shards, cache_bytes=0).images
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_index", None)
        patch.setattr("kdpipe.stages.data.image_source.decode_image", None)
        again = load(shards, cache_bytes=0).images
    assert isinstance(first, ImageFiles) and isinstance(again, ImageFiles)
    assert again.checksums.tolist() == first.checksums.tolist()
    assert np.array_equal(again.read(2), first.read(2))
    write_tar(shards / "x-train-1.tar", members(SAMPLES[2:], 50))
    os.utime(shards / "x-train-1.tar", (1, 1))
    assert load(shards, cache_bytes=0).images.checksums.tolist() != first.checksums.tolist()


def damage(shards, change):
    file = shards / "x-train-0.tar"
    file.write_bytes(change(bytearray(file.read_bytes())))


def test_damaged_shards_are_refused(shards):
    whole = (shards / "x-train-0.tar").read_bytes()
    for change, wanted in [
        (lambda data: data[:600], "x-train-0.tar cannot be read as a tar file after cat/a.png"),
        (lambda data: data[:-12000], "x-train-0.tar cannot be read as a tar file after"),
        (lambda data: data[:2048], "x-train-0.tar is cut off after cat/a.cls"),
        (lambda data: b"no tar" * 200, "cannot be read as a tar file after its start"),
        (lambda data: data + data, "or holds several tar files one after the other"),
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], "x-train-0.tar is damaged after cat/a.png"),
    ]:
        (shards / "x-train-0.tar").write_bytes(whole)
        damage(shards, change)
        assert wanted in refusal(shards)


def test_broken_member_is_named_or_dropped(shards):
    write_tar(shards / "x-train-0.tar", [("cat/a.png", b"none"), ("cat/a.cls", b"cat"), *members(SAMPLES[1:2])])
    assert "x-train-0.tar: cat/a.png cannot be decoded" in refusal(shards)
    assert load(shards, unreadable="drop").num_samples == 3


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([("a.cls", b"1")], "a.cls: the sample must have one image, found none"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "found a.png, a.jpg"),
        ([("a.png", b"x"), ("a.cls", b" ")], "a.cls: the label must be a whole number or a name, found ''"),
        ([("a.png", b"x"), ("a.json", b"{")], "a.json cannot be read as a label"),
        ([("a.png", b"x"), ("a.json", b'{"label": 1, "class": 2}')], "a.json has several labels (label, class)"),
        ([("a.png", b"x"), ("a.json", b'{"label": [1]}')], "must be a whole number or a name, found [1]"),
        ([("a.png", b"x"), ("a.cls", b"1.5")], "a.png: labels that are numbers must be 0, 1, ... C - 1, found '1.5'"),
        ([("a.txt", b"x")], "holds no samples"),
    ],
)
def test_unclear_samples_are_refused(tmp_path, given, wanted):
    assert wanted in refusal(write_tar(tmp_path / "a.tar", given))


def test_unclear_places_are_refused(shards, tmp_path):
    assert "no file" in refusal(f"{shards}/x-train-{{0..2}}.tar") and "x-train-2.tar" in refusal(
        f"{shards}/x-train-{{0..2}}.tar"
    )
    (tmp_path / "empty").mkdir()
    assert "has no tar files" in refusal(tmp_path / "empty")
    write_tar(shards / "more.tar", members())
    assert "is of the train split, and more.tar is of none" in refusal(shards)
    write_tar(tmp_path / "train-test.tar", members())
    assert "stands for the splits test and train" in refusal(tmp_path / "train-test.tar")


def test_class_of_the_test_split_must_be_known(shards):
    write_tar(shards / "x-val-0.tar", members([("ox/e", "ox")]))
    assert "x-val-0.tar: ox/e.png: the class 'ox' is missing from the train split" in refusal(shards, "test")


def test_columns_do_not_apply(shards):
    with pytest.raises(RecipeError, match=r"data.label_column applies only to table, hf_dataset"):
        load(shards, label_column="x")
