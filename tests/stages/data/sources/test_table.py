"""Tables of paths and labels list the same samples in every format, and refuse what can be meant in two ways."""

import csv
import os

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from kdpipe.stages.data import image_source, scan
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import digest
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.data.sources.table import _class_names, _Row
from kdpipe.stages.errors import DataError, RecipeError

ROWS = [("b.png", "dog"), ("more/a.png", "cat"), ("c.png", "cat"), ("d.png", "dog"), ("é.png", "cat")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "more").mkdir()
    for seed, (name, _) in enumerate(ROWS):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def write(file, rows, header=("path", "label"), delimiter=",", encoding="utf-8"):
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.table(dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))), file)
        return file
    with file.open("w", newline="", encoding=encoding) as opened:
        csv.writer(opened, delimiter=delimiter).writerows([header, *rows])
    return file


def load(path, split="train", **keys):
    return load_dataset(DataConfig(name=f"table:{path}", **keys), split)


def refusal(path, split="train"):
    with pytest.raises(DataError) as caught:
        load(path, split)
    return str(caught.value)


def test_rows_are_samples_and_paths_are_ids(folder):
    rows = [(*row, "train" if row[0] != "d.png" else "test") for row in ROWS]
    file = write(folder / "list.csv", rows, ("path", "label", "split"))
    train, test = load(file), load(file, "test")
    assert (train.name, train.class_names, test.class_names) == ("table:list.csv", ("cat", "dog"), ("cat", "dog"))
    assert train.sample_ids.tolist() == [sample_id(key) for key in ("b.png", "c.png", "more/a.png", "é.png")]
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 0, 0], [1])
    expected = np.asarray(Image.open(folder / "more" / "a.png")).transpose(2, 0, 1)
    assert np.array_equal(train.images[2].numpy(), expected)


def test_format_order_and_kind_of_path_change_nothing(folder):
    want = load(write(folder / "list.csv", ROWS))
    others = [
        write(folder / "list.parquet", ROWS[::-1], ("file_name", "class")),
        write(folder / "list.tsv", ROWS, ("Image", "Target"), "\t"),
        write(folder / "excel.csv", ROWS, delimiter=";", encoding="utf-8-sig"),
        write(folder / "absolute.csv", [(str(folder / name), label) for name, label in ROWS]),
        write(folder / "dots.csv", [(f"./{name}", label) for name, label in ROWS]),
    ]
    for file in others:
        found = load(file)
        assert torch.equal(found.sample_ids, want.sample_ids) and torch.equal(found.images, want.images)
        assert torch.equal(found.labels, want.labels)
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert digest(load(moved / "list.csv")) == digest(want)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_folder_has_a_table_for_each_split(folder, suffix):
    numbered = [(name, number % 2 * 2) for number, (name, _) in enumerate(ROWS)]
    write(folder / f"train.{suffix}", numbered[:3])
    write(folder / f"val.{suffix}", numbered[3:])
    train, test = load(folder), load(folder, "test")
    assert (
        train.class_names == ("0", "1", "2") and train.labels.tolist() == [0, 0, 2] and test.labels.tolist() == [2, 0]
    )
    assert any("test split is its val split" in notice for notice in train.notices)


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (ROWS, ("path", "kind"), "one column must hold the labels, named label, class"),
        ([(*row, 1) for row in ROWS], ("path", "label", "class"), "several (label, class): keep one"),
        ([("b.png", "dog"), ("b.png", "cat")], ("path", "label"), "line 3: b.png is listed before"),
        ([("", "dog")], ("path", "label"), "line 2: the image's path must be text"),
        ([("b.png", "1.0"), ("c.png", "0.0")], ("path", "label"), "must be 0, 1, ... C - 1, found '1.0'"),
        ([("https://x.org/a.png", "dog")], ("path", "label"), "is an address"),
        ([("away.png", "dog")], ("path", "label"), "there is no file"),
        ([("b.png", "dog", "extra")], ("path", "label"), "line 2: 3 cells, and the header has 2"),
        ([], ("path", "label"), "lists no images"),
        ([("b.png", "dog", "holdout")], ("path", "label", "split"), "must be train, val or test, found 'holdout'"),
        ([("b.png", "dog", "train")], ("path", "label", "split"), "must name a train and a test (or val) split"),
        ([("b.png", "a", "train"), ("b.png", "a", "test")], ("path", "label", "split"), "of the train split, too"),
    ],
)
def test_what_is_unclear_is_refused_with_its_line(folder, rows, header, said):
    assert said in refusal(write(folder / "list.csv", rows, header))


def test_test_class_without_a_training_image_is_refused(folder):
    write(folder / "train.csv", ROWS[:1])
    write(folder / "test.csv", ROWS[1:2])
    assert "line 2: the class 'cat' is missing from the train split: its classes are dog" in refusal(folder, "test")


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_damaged_tables_are_refused_in_a_sentence(folder, name):
    (folder / name).write_bytes(b"path,label\n\xff\xfe,1\n")
    assert "cannot be read as" in refusal(folder / name)
    assert "no table" in refusal(folder / "missing.csv")
    assert "needs a table of the train" in refusal(folder)


def test_parquet_of_image_bytes_is_refused(folder):
    file = write(folder / "list.parquet", [({"bytes": b"x", "path": None}, 1)], ("image", "label"))
    assert "row 1: the image's path must be text" in refusal(file)


@given(st.lists(st.integers(0, 50), min_size=1) | st.lists(st.text("abc1", min_size=1), min_size=1))
def test_whole_numbers_are_classes_and_all_else_is_names(labels):
    names = _class_names("x", [_Row("p", label, None, "x, line", 2) for label in labels])
    assert {str(label) for label in labels} <= set(names) or "0" in names
    numbers = all(str(label).isdigit() and str(int(label)) == str(label) for label in labels)
    assert names == (
        tuple(map(str, range(max(map(int, labels)) + 1))) if numbers else tuple(sorted(set(map(str, labels))))
    )


def test_scans_of_both_splits_are_cached(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name, _ in ROWS:
        os.utime(folder / name, (1, 1))
    monkeypatch.setattr(scan, "is_settled", lambda found, now_ns: True)
    rows = [(*row, "train" if row[0] != "d.png" else "test") for row in ROWS]
    file = write(folder / "list.csv", rows, ("path", "label", "split"))
    wanted = [load(file, split, cache_bytes=0).images.checksums for split in ("train", "test")]
    monkeypatch.setattr(image_source, "decode_image", None)
    for split, checksums in zip(("train", "test"), wanted, strict=True):
        assert np.array_equal(load(file, split, cache_bytes=0).images.checksums, checksums)


def test_an_empty_cell_is_an_unlabeled_image(folder):
    rows = [("b.png", ""), *ROWS[1:]]
    for file in (write(folder / "list.csv", rows), write(folder / "list.parquet", [("b.png", None), *ROWS[1:]])):
        train = load(file, test_share=0.01)
        assert train.class_names == ("cat", "dog")
        assert train.sample_ids[train.labels == -1].tolist() == [sample_id("b.png")]
        assert train.notices[-1].endswith(f"1 of {train.num_samples} samples have no label (-1).")


def test_columns_of_numbers_are_targets(folder):
    header, rows = ("path", "age", "size"), [(name, number, 0.5) for number, (name, _) in enumerate(ROWS)]
    keys = {"task": "regression", "label_column": ("age", "size"), "test_share": 0.01}
    for suffix in ("csv", "parquet"):
        train = load(write(folder / f"list.{suffix}", [("b.png", None, 0.5), *rows[1:]], header), **keys)
        number = {sample_id(name): value for name, value, _ in rows}
        wanted = [float("nan") if one == sample_id("b.png") else number[one] for one in train.sample_ids.tolist()]
        assert train.class_names == ("age", "size")
        assert np.array_equal(train.targets[:, 0].numpy(), np.float32(wanted), equal_nan=True)
    with pytest.raises(DataError, match="line 2: the label must be a number, or empty, found 'old'"):
        load(write(folder / "list.csv", [("b.png", "old", 1)], header), **keys)


LISTED = [("b.png", "hat|red", "train"), ("c.png", "|", "train"), ("d.png", "", "train"), ("é.png", "red", "test")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_one_cell_may_have_several_labels(suffix, folder):
    file = write(folder / f"list.{suffix}", LISTED, ("path", "tags", "split"))
    keys = {"task": "multilabel", "label_column": "tags", "label_separator": "|"}
    train, test = load(file, **keys), load(file, "test", **keys)
    assert train.class_names == test.class_names == ("hat", "red")
    found = dict(zip(train.sample_ids.tolist(), train.targets.tolist(), strict=True))
    assert (found[sample_id("b.png")], found[sample_id("c.png")]) == ([1, 1], [0, 0])
    assert np.isnan(found[sample_id("d.png")]).all() and test.targets.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "separator", "sentence"),
    [
        (("é.png", "red|cap", "test"), "|", "list.csv, line 5: the label 'cap' is missing from the train split: its"),
        (("é.png", "red||hat", "train"), "|", "list.csv, line 5: there is an empty name in 'red||hat'"),
        (LISTED[3], ";", r"no label has the separator ';' \(data.label_separator\): found hat|red, |"),
    ],
)
def test_unclear_labels_in_one_cell_are_refused(row, separator, sentence, folder):
    rows = [*LISTED[:3], row, ("more/a.png", "hat", "test")]
    file = write(folder / "list.csv", rows, ("path", "tags", "split"))
    keys = {"task": "multilabel", "label_column": "tags", "label_separator": separator}
    with pytest.raises(DataError, match=sentence.replace("|", r"\|")):
        load(file, row[2], **keys)


def test_what_a_task_does_not_fit_is_refused(folder):
    file = write(folder / "list.csv", ROWS)
    with pytest.raises(RecipeError, match="names several columns: one holds the class"):
        load(file, label_column=("label", "path"))
    with pytest.raises(RecipeError, match="data.classes selects samples of some classes"):
        load(file, task="multilabel", classes=("cat",))
    with pytest.raises(RecipeError, match="data.label_separator is for several labels in one column"):
        load(file, label_separator="|")
    with pytest.raises(RecipeError, match="digits has classes only"):
        load_dataset(DataConfig(name="digits", task="regression"), "train")
