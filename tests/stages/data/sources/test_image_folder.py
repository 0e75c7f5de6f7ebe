from __future__ import annotations

import os
import struct
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet, digest
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources import image_folder
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.errors import DataError, RecipeError


def _write(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes with a training split of 3 + 2 and a test split of 1 + 1."""
    root = tmp_path / "pets"
    for at, name in enumerate(["cat/b.png", "cat/a.png", "cat/more/c.png", "dog/x.PNG", "dog/y.png"]):
        _write(root / "train" / name, at)
    for at, name in enumerate(["cat/a.png", "dog/z.png"]):
        _write(root / "val" / name, 10 + at)
    return root


def _load(path: Path, split: str = "train", **keys: Any) -> ImageSet:
    return load_dataset(DataConfig(name=f"imagefolder:{path}", **keys), split)  # type: ignore[arg-type]


def test_folders_are_classes_and_paths_are_ids(pets: Path) -> None:
    train = _load(pets)
    assert train.name == "imagefolder:pets"
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    keys = ["cat/a.png", "cat/b.png", "cat/more/c.png", "dog/x.PNG", "dog/y.png"]
    assert train.sample_ids.tolist() == [sample_id(key) for key in keys]
    expected = np.asarray(Image.open(pets / "train" / "dog" / "x.PNG")).transpose(2, 0, 1)
    assert np.array_equal(train.images[3].numpy(), expected)


def test_the_id_of_a_path_never_changes() -> None:
    assert sample_id("cat/a.png") == 7468273022372850630  # printf cat/a.png | b2sum -l 64, halved
    assert all(0 <= sample_id(str(number)) < 2**63 for number in range(1000))


def test_the_order_in_which_a_disk_lists_files_does_not_matter(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _load(pets)
    walk, scandir = os.walk, os.scandir
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    backwards = lambda path: sorted(scandir(path), key=lambda each: each.name, reverse=True)  # noqa: E731
    monkeypatch.setattr(image_folder, "os", SimpleNamespace(**{**vars(os), "scandir": backwards}))
    after = _load(pets)
    assert digest(after) == digest(before)
    assert torch.equal(after.images, before.images)


def test_moving_the_folder_keeps_every_id(pets: Path, tmp_path: Path) -> None:
    before = _load(pets)
    moved = tmp_path / "elsewhere" / "pets"
    moved.parent.mkdir()
    pets.rename(moved)
    assert digest(_load(moved)) == digest(before)


def test_a_test_folder_goes_before_val(pets: Path) -> None:
    assert _load(pets, "test").num_samples == 2
    _write(pets / "test" / "dog" / "only.png")
    test = _load(pets, "test")
    assert test.labels.tolist() == [1]
    assert test.class_names == ("cat", "dog")


def test_a_folder_without_splits_is_split(tmp_path: Path) -> None:
    for at in range(10):
        _write(tmp_path / "flat" / ("cat" if at % 2 else "train") / f"{at}.png", at)
    train, test = (_load(tmp_path / "flat", split) for split in ("train", "test"))
    assert (train.num_samples, test.num_samples) == (8, 2)
    assert train.class_names == test.class_names == ("cat", "train")
    assert not set(train.sample_ids.tolist()) & set(test.sample_ids.tolist())


def test_images_that_are_not_wanted_are_not_decoded(pets: Path) -> None:
    wanted = _load(pets, num_train=2)
    train = pets / "train"
    keys = [file.relative_to(train).as_posix() for file in train.rglob("*.*")]
    spare = [key for key in keys if sample_id(key) not in wanted.sample_ids.tolist()]
    assert len(spare) == 3
    for key in spare:
        (train / key).write_bytes(b"damaged")
    assert torch.equal(_load(pets, num_train=2).images, wanted.images)


def test_what_is_left_out_is_counted(pets: Path) -> None:
    before = digest(_load(pets))
    assert _load(pets).notices == ()
    (pets / "train" / "README.txt").write_text("about")
    (pets / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (pets / "train" / "cat" / "._a.png").write_bytes(b"")
    (pets / "train" / ".ipynb_checkpoints").mkdir()
    for name in ("cat/photo.heic", "dog/photo.heic", "dog/.hidden.png", "loose.png"):
        _write(pets / "train" / "cat" / "whatever.png")
        (pets / "train" / "cat" / "whatever.png").rename(pets / "train" / name)
    (pets / "train" / "dog" / "up").symlink_to(pets / "train", target_is_directory=True)
    train = _load(pets)
    assert digest(train) == before
    assert train.notices == (
        f"{pets}/train: left out are 2 .heic files (cat/photo.heic), 1 hidden folders (.ipynb_checkpoints), "
        "1 hidden images (dog/.hidden.png), 1 images in no class folder (loose.png), 1 links to a folder above "
        "(dog/up).",
    )


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.gif", "a.avif", "a.jp2", "a.pgm", "a.dib"])
def test_every_suffix_of_a_format_is_an_image(pets: Path, name: str) -> None:
    (pets / "train" / "cat" / name).write_bytes((pets / "train" / "cat" / "a.png").read_bytes())
    assert _load(pets).num_samples == 6


def test_links_are_followed_as_torchvision_does(pets: Path, tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere" / "deep" / "x.png")
    (pets / "train" / "cat" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(pets / "train" / "cat", target_is_directory=True)
    (pets / "train" / "emu").symlink_to(tmp_path / "elsewhere" / "deep", target_is_directory=True)
    train = _load(pets)
    assert train.sample_ids.tolist()[2] == sample_id("cat/linked/deep/x.png")
    assert train.class_names == ("cat", "dog", "emu") and train.num_samples == 7
    assert "1 links to a folder above (cat/linked/back)" in train.notices[0]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("TRAIN", "TEST"), ("Train", "Valid"), ("training_set", "test_set"), ("train", "dev")],
)
def test_splits_have_other_names_in_any_case(pets: Path, train: str, test: str) -> None:
    before = [digest(_load(pets, split)) for split in ("train", "test")]
    (pets / "train").rename(pets / train)
    (pets / "val").rename(pets / test)
    assert [digest(_load(pets, split)) for split in ("train", "test")] == before
    assert _load(pets).notices == (f"{pets}: {train} is the training split, {test} the test split.",)


def test_folders_beside_the_splits_are_told(pets: Path) -> None:
    _write(pets / "test" / "cat" / "a.png")
    (pets / "annotations").mkdir()
    assert _load(pets).notices == (f"{pets}: the folders annotations, val are not used.",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a.png", "test/b.png"], "has the folders test, train: .* have no class folders"),
        (["Training/a.png"], "have no class folders in them"),
        (["Train/cat/a.png", "training/cat/a.png"], "Train and training both stand for train"),
        (["Testing/cat/a.png", "more/a.png"], "with a test split, but no train split: looked for train, test and val"),
        (["cat/train/a.png", "cat/val/a.png", "dog/train/a.png"], "class folder .*/cat holds the folders train, val"),
        (["pets/train/cat/a.png", "pets/test/cat/a.png"], "/pets would be the only class.*use it as PATH"),
        (["pets/cat/a.png", "pets/dog/a.png"], "/pets would be the only class.*holds the folders cat, dog: use it"),
    ],
)
def test_folders_that_can_be_meant_in_two_ways_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        _write(tmp_path / "set" / name)
    with pytest.raises(DataError, match=message):
        _load(tmp_path / "set")


def test_a_relative_path_starts_at_the_root(pets: Path) -> None:
    config = DataConfig(name="imagefolder:pets", root=str(pets.parent))
    assert load_dataset(config, "train").num_samples == 5


def test_spelling_accents_as_macos_does_keeps_the_ids(tmp_path: Path) -> None:
    sets = []
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café")
        _write(tmp_path / form / "pets" / "train" / name / f"{name}.png")
        sets.append(digest(_load(tmp_path / form / "pets")))
    assert sets[0] == sets[1]


@pytest.mark.parametrize("name", ["cat/é.png", "é/cat.png"], ids=["image", "class"])
def test_two_spellings_of_one_name_are_refused(pets: Path, name: str) -> None:
    for form in ("NFC", "NFD"):
        _write(pets / "train" / unicodedata.normalize(form, name))
    with pytest.raises(DataError, match="differ only in Unicode normalization"):
        _load(pets)


def test_a_size_makes_unequal_images_equal(pets: Path) -> None:
    _write(pets / "train" / "dog" / "z.png", size=(30, 20))
    assert _load(pets, image_size=4).images.shape == (6, 3, 4, 4)


def test_channels_1_gives_grayscale(pets: Path) -> None:
    rgb, gray = _load(pets), _load(pets, channels=1)
    assert gray.images.shape == (5, 1, 6, 8)
    expected = Image.fromarray(rgb.images[0].permute(1, 2, 0).numpy()).convert("L")
    assert np.array_equal(gray.images[0, 0].numpy(), np.asarray(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "pets" / "train" / "cat" / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(file)
    images = _load(tmp_path / "pets").images
    assert images.shape == (1, 3, 4, 4)
    assert int(images.min()) == 255


def test_sixteen_bits_are_refused_rather_than_clipped(pets: Path) -> None:
    deep = pets / "train" / "cat" / "deep.png"
    Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16)).save(deep)
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per channel"):
        _load(pets)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    _write(tmp_path / "pets" / "train" / "cat" / "a.jpg", size=(30, 20), exif=exif)
    assert _load(tmp_path / "pets").image_size == (30, 20)  # (H, W): portrait


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_that_is_no_image_is_named(pets: Path, content: bytes) -> None:
    (pets / "train" / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"train/dog/bad\.png cannot be decoded"):
        _load(pets)


@pytest.mark.parametrize("size", [None, 8])
def test_the_sample_that_cannot_be_read_is_named_too(pets: Path, size: int | None) -> None:
    (pets / "train" / "dog" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=f"sample {sample_id('dog/bad.png')} cannot be read: .*data.unreadable"):
        _load(pets, image_size=size)


def test_a_truncated_image_is_named(pets: Path) -> None:
    cut = pets / "train" / "cat" / "cut.jpg"
    _write(cut, size=(64, 48))
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded"):
        _load(pets, image_size=8)


@pytest.mark.parametrize("side", [10_000, 60_000], ids=["Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_refused(pets: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (pets / "train" / "cat" / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.png has more than \d+ pixels"):
        _load(pets, image_size=8)


def test_size_argument_overrides_the_recipe(pets: Path) -> None:
    config = DataConfig(name=f"imagefolder:{pets}", image_size=4)
    assert load_dataset(config, "train", size=5).image_size == (5, 5)
    assert torch.equal(load_dataset(config, "train", size=4).images, load_dataset(config, "train").images)


def test_the_middle_of_test_photographs_alone_is_taken(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _write(tmp_path / "pets" / split / "cat" / "a.png", size=(48, 32))
    train, whole, middle = (
        _load(tmp_path / "pets", split, image_size=14, test_crop=crop)
        for split, crop in (("train", 0.875), ("test", 1.0), ("test", 0.875))
    )
    assert torch.equal(train.images, whole.images)
    # As evaluation usually does it, 256 -> 224 in small: the shorter side resized to 16, of which the middle 14 stay.
    resized = Image.open(tmp_path / "pets" / "test" / "cat" / "a.png").resize((24, 16), Image.Resampling.BILINEAR)
    usual = np.asarray(resized).transpose(2, 0, 1)[:, 1:15, 5:19]
    assert np.array_equal(middle.images[0].numpy(), usual)
    in_files = _load(tmp_path / "pets", "test", image_size=14, test_crop=0.875, cache_bytes=0)
    assert np.array_equal(in_files.read(0), usual)


def test_a_test_crop_needs_a_size(pets: Path) -> None:
    assert _load(pets, "train", test_crop=0.875).num_samples == 5
    with pytest.raises(RecipeError, match="data.test_crop needs a size"):
        _load(pets, "test", test_crop=0.875)


def test_missing_folder_error_has_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset(DataConfig(name="imagefolder:nowhere", root=str(tmp_path)), "train")
    assert f"no folder {tmp_path / 'nowhere'}" in str(raised.value)
    assert "data.root" in str(raised.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folders"):
        _load(tmp_path)


def test_a_class_without_images_is_refused(pets: Path) -> None:
    (pets / "train" / "emu").mkdir()
    (pets / "train" / "emu" / "a.heic").touch()
    with pytest.raises(DataError, match=r"train/emu has no images .*remove the folder.* 1 .heic files \(emu/a.heic\)"):
        _load(pets)


def test_a_test_class_may_be_empty(pets: Path) -> None:
    (pets / "val" / "dog" / "z.png").unlink()
    test = _load(pets, "test")
    assert test.labels.tolist() == [0] and test.class_names == ("cat", "dog")
    assert test.notices == (
        "data set imagefolder:pets (test): 1 of 2 classes have no sample: 'dog'. Their accuracy is not measured.",
    )
    (pets / "val" / "cat" / "a.png").unlink()
    with pytest.raises(DataError, match="/val has no images in its class folders"):
        _load(pets, "test")


def test_a_class_that_train_lacks_is_refused(pets: Path) -> None:
    _write(pets / "val" / "emu" / "a.png")
    with pytest.raises(
        DataError, match="class folder 'emu', which is missing from the train split: its classes are cat, dog"
    ):
        _load(pets, "test")


def test_a_missing_test_split_is_refused(pets: Path) -> None:
    (pets / "val").rename(pets / "holdout")
    with pytest.raises(DataError, match="has the folders holdout, train: .* no test split .* Looked for train, test"):
        _load(pets, "test")


def test_a_folder_that_cannot_be_listed_is_named(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(folder: Path, onerror: Any, followlinks: bool) -> list[Any]:
        onerror(PermissionError(13, "Permission denied", str(folder)))
        return []

    monkeypatch.setattr(os, "walk", forbidden)
    with pytest.raises(DataError, match=r"cannot list .*/train/cat: Permission denied"):
        _load(pets)


def test_unlabeled_images_need_no_class_folders(pets: Path) -> None:
    for at in range(3):
        _write(pets.parent / "photos" / "train" / f"{at}.png", at)
    photos = pets.parent / "photos"
    with pytest.raises(DataError, match="no class folders.* set data.labels = 'none'"):
        _load(photos)
    with pytest.raises(DataError, match=r"its classes are not known: name them .*\(data.classes\)"):
        _load(photos, labels="none")
    named = _load(photos, labels="none", classes=("ox", "hen"), test_share=0.4)
    assert (named.class_names, named.labels.tolist(), len(named.notices)) == (("ox", "hen"), [-1, -1], 0)
    by_teacher = load_dataset(
        DataConfig(name=f"imagefolder:{photos}", labels="none"), "train", name_classes=lambda: ("a", "b")
    )
    assert by_teacher.class_names == ("a", "b")
    (pets / "val").rename(photos / "test")
    train, test = (_load(photos, split, labels="none") for split in ("train", "test"))
    assert train.sample_ids.tolist() == [sample_id(f"{at}.png") for at in range(3)]
    assert (train.class_names, train.has_labels, test.labels.tolist()) == (("cat", "dog"), False, [0, 1])


def test_labels_none_leaves_class_folders_and_ids_as_they_are(pets: Path) -> None:
    whole, none = _load(pets), _load(pets, labels="none")
    assert (digest(none), none.has_labels, none.class_names) == (digest(whole), False, whole.class_names)
    assert _load(pets, "test", labels="none").is_labeled
