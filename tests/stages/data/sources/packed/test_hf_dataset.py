"""Data sets of the library `datasets`: saved or Parquet folders, columns by type, a sentence for what is unclear."""

import builtins
import io

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.errors import DataError

CLASSES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def images(num=4, first=0):
    return [png(first + number) for number in range(num)]


def made(label=CLASSES, labels=(0, 1, 1, 0), first=0, **columns):
    features = datasets.Features(image=datasets.Image(), label=label, **{key: each[0] for key, each in columns.items()})
    found = {
        "image": images(len(labels), first),
        "label": list(labels),
        **{key: each[1] for key, each in columns.items()},
    }
    return datasets.Dataset.from_dict(found, features=features)


def load(place, split="train", **keys):
    return load_dataset(DataConfig(name=f"hf_dataset:{place}", **keys), split)


def refusal(place, split="train", **keys):
    with pytest.raises(DataError) as caught:
        load(place, split, **keys)
    return str(caught.value)


def check(place):
    train, test = load(place), load(place, "test")
    assert (train.num_samples, train.class_names, train.labels.tolist()) == (4, ("cat", "dog"), [0, 1, 1, 0])
    assert (test.num_samples, test.sample_ids.tolist(), test.labels.tolist()) == (2, [0, 1], [1, 0])
    for number in range(4):
        assert np.array_equal(train.read(number), pixels(number).transpose(2, 0, 1))


@pytest.fixture
def saved(tmp_path):
    place = tmp_path / "saved"
    datasets.DatasetDict(train=made(), validation=made(labels=(1, 0), first=7)).save_to_disk(place)
    return place


def test_saved_and_parquet_folders_hold_the_same(saved, tmp_path):
    check(saved)
    assert load(saved).notices == ("hf_dataset:saved: the test split is its validation split.",)
    place = tmp_path / "hub" / "data"
    place.mkdir(parents=True)
    made().to_parquet(place / "train-00000-of-00001.parquet")
    made(labels=(1, 0), first=7).to_parquet(place / "test-00000-of-00001.parquet")
    check(place.parent)


def test_rows_are_read_in_workers_and_scans_cached(saved, monkeypatch):
    train = load(saved, cache_bytes=0)
    assert isinstance(train.images, ImageFiles) and train.images.source.stamp(0) != (-1, -1, -1)
    loader = ImageLoader(train, torch.device("cpu"), num_workers=1)
    found = loader.get(ViewRequest(torch.tensor([2, 0]))).images
    assert np.array_equal(found[0].numpy(), pixels(2).transpose(2, 0, 1))
    assert train.images.source.where(2) == "hf_dataset:saved (train), row 2"


def test_paths_are_files(tmp_path):
    for number, name in enumerate(["cat", "cat", "dog", "dog"]):
        (tmp_path / "pics" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(tmp_path / "pics" / name / f"{number}.png")
    train = load(tmp_path / "pics", cache_bytes=0, test_share=0.5)  # as the library reads folders of images
    assert train.class_names == ("cat", "dog") and train.images.source.stamp(0) == (-1, -1, -1)
    assert np.array_equal(train.read(0), pixels(int(train.sample_ids[0])).transpose(2, 0, 1))


@pytest.mark.parametrize("column", [images(4), [image["bytes"] for image in images(4)]], ids=["struct", "binary"])
def test_parquet_without_types_and_with_names_as_labels(tmp_path, column):
    table = pyarrow.table({"pic": column, "Class": ["b", "a", "a", "b"], "number": [1, 2, 3, 4]})
    (tmp_path / "plain").mkdir()
    parquet.write_table(table, tmp_path / "plain" / "all.parquet")
    train = load(tmp_path / "plain", test_share=0.5)
    assert (train.num_samples, train.class_names) == (2, ("a", "b"))
    assert np.array_equal(train.read(0), pixels(int(train.sample_ids[0])).transpose(2, 0, 1))


def save(place, dataset):
    dataset.save_to_disk(place)
    return place


def test_columns_are_chosen_or_told(tmp_path):
    two = made(coarse=(datasets.ClassLabel(names=["x"]), [0] * 4), other=(datasets.Image(), images()))
    place = save(tmp_path / "two", two)
    assert "hold the images, found several: image, other. Name it in data.image_column" in refusal(place)
    assert "hold the labels, found several: label, coarse" in refusal(place, image_column="image")
    assert "the columns are image (Image), label (ClassLabel), coarse (ClassLabel), other (Image)" in refusal(place)
    found = load(place, image_column="other", label_column="coarse", test_share=0.5)
    assert found.class_names == ("x",)
    assert "hold the labels, found no 'fine'" in refusal(place, image_column="image", label_column="fine")
    none = save(tmp_path / "none", made().remove_columns("label"))
    assert "hold the labels, found none" in refusal(none)
    texts = made(note=(datasets.Value("string"), ["x"] * 4))
    assert "holds string, and no encoded images" in refusal(save(tmp_path / "t", texts), image_column="note")


@pytest.mark.parametrize(
    ("label", "labels", "wanted"),
    [
        (datasets.Value("float32"), [0.5, 1, 1, 0], "row 0: the label must be a whole number or a name, found 0.5"),
        (datasets.Value("string"), ["0", "1.5", "2", "3"], "row 1: labels that are numbers must be 0, 1, ... C - 1"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, label, labels, wanted):
    assert wanted in refusal(save(tmp_path / "x", made(label, labels)))


def test_empty_cells_and_missing_columns_are_unlabeled(tmp_path):
    for number, label in enumerate((CLASSES, datasets.Value("int64"), datasets.Value("string"))):
        values = [0, 0, 1, 1, -1, None] if number < 2 else ["0", "0", "1", "1", None, None]
        place = save(tmp_path / str(number), made(label, values))
        assert sorted(load(place, test_share=0.5).labels.tolist()) == [-1, 0, 1]
    none = save(tmp_path / "none", made().remove_columns("label"))
    assert load(none, labels="none", classes=("x", "y"), test_share=0.5).labels.tolist() == [-1, -1]


def test_secret_test_labels_leave_the_validation_split(tmp_path):
    splits = datasets.DatasetDict(train=made(), validation=made(first=5), test=made(labels=(-1, -1)))
    splits.save_to_disk(tmp_path / "x")
    assert load(tmp_path / "x", "test").num_samples == 4
    assert load(tmp_path / "x").notices == ("hf_dataset:x: the test split is its validation split; not used: test.",)
    datasets.DatasetDict(left=made(), right=made()).save_to_disk(tmp_path / "y")
    assert "has the splits left, right: expected train and test (or validation)" in refusal(tmp_path / "y")


def test_empty_and_damaged_cells_are_named(tmp_path):
    dataset = made()
    broken = dataset.remove_columns("image").add_column("image", [*images(2), None, {"bytes": b"x", "path": None}])
    place = save(tmp_path / "x", broken.cast_column("image", datasets.Image()))
    assert load(place, unreadable="drop", test_share=0.5).num_samples >= 1
    assert "(train), row 2 cannot be read (the cell is empty)" in refusal(place, "test", test_share=0.5) + refusal(
        place, test_share=0.5
    )


def test_names_that_cannot_be_loaded_are_one_sentence(tmp_path):
    found = refusal("nobody/nothing", root=str(tmp_path), download=False)
    assert found.startswith(f"hf_dataset:nobody/nothing is no folder {tmp_path}/nobody/nothing, and cannot be loaded")
    assert "(data.download is false): check the name" in found
    assert f"no folder {tmp_path}/a/b/c" in refusal("a/b/c", root=str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "empty cannot be read as a data set of the library datasets" in refusal(tmp_path / "empty")


def test_missing_library_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keys):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'kdpipe[datasets]'" in refusal(tmp_path)


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "cow"]])
def test_lists_of_other_classes_than_the_train_split_are_refused(names, tmp_path):
    train, test = (
        made(datasets.Sequence(datasets.ClassLabel(names=each)), [[0], [1]], first)
        for each, first in ((["cat", "dog"], 0), (names, 5))
    )
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "tags")
    assert load(tmp_path / "tags", task="multilabel").class_names == ("cat", "dog")
    said = refusal(tmp_path / "tags", "test", task="multilabel")
    assert said.endswith(
        f"the names of the classes of 'label' ({', '.join(names)}) are not those of the train split "
        "(cat, dog): give both the same, in the same order."
    )


def test_lists_of_classes_and_columns_of_numbers_are_targets(tmp_path):
    lists = datasets.Sequence(CLASSES)
    save(tmp_path / "tags", made(lists, [[0], [], None, [0, 1]], age=(datasets.Value("float32"), [1.5, 2, None, 4])))
    tagged = load(tmp_path / "tags", task="multilabel", test_share=0.01)
    assert (tagged.class_names, tagged.labels.tolist().count(-1)) == (("cat", "dog"), 1)
    wanted = {0: [1.0, 0.0], 1: [0.0, 0.0], 3: [1.0, 1.0]}
    found = dict(zip(tagged.sample_ids.tolist(), tagged.targets.tolist(), strict=True))
    assert all(found[number] == row for number, row in wanted.items() if number in found)
    numbers = load(tmp_path / "tags", task="regression", label_column="age", test_share=0.01)
    assert numbers.class_names == ("age",) and 2.0 in numbers.targets[:, 0].tolist()
    with pytest.raises(DataError, match="no column 'size'"):
        load(tmp_path / "tags", task="regression", label_column=("age", "size"))
