from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.sources.user_function import DATASETS
from kdpipe.stages.errors import DataError, RecipeError, UnknownDataError

MODULE = """
import numpy as np
import torch

IMAGES = np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def arrays(split):
    print("reading")
    return (IMAGES, LABELS) if split == "train" else (IMAGES[:2], LABELS[:2])


def tensors(split):
    return torch.from_numpy(IMAGES)[..., None], torch.from_numpy(LABELS), torch.arange(6) + 50


def any_keywords(split, **root):
    assert not root
    return IMAGES, LABELS


class Pairs(torch.utils.data.Dataset):
    classes = ["a", "b", "c"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.from_numpy(IMAGES[index]), int(LABELS[index])


def pairs(split):
    return Pairs()


def rooted(split, root):
    return IMAGES, LABELS, None, (root, "b", "c")


def lists(split):
    return IMAGES, [0, 1, 2, 0, 1, 2]


def one_thing(split):
    return IMAGES


def wrong_names(split):
    return IMAGES, LABELS, None, (1, 2, 3)


def broken(split):
    raise RuntimeError("lost\\nand gone")


def equal_ids(split):
    return IMAGES, LABELS, LABELS
"""


@pytest.fixture(autouse=True)
def _module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "toys.py").write_text(textwrap.dedent(MODULE))
    (package / "failing.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[name]


def _load(function: str, split: str = "train", **keys: Any) -> ImageSet:
    return load_dataset(DataConfig(name=f"python:toy_package.{function}", **keys), split)  # type: ignore[arg-type]


def test_a_function_may_return_arrays(capfd: pytest.CaptureFixture[str]) -> None:
    train, test = _load("toys:arrays"), _load("toys:arrays", "test")
    assert train.name == "python:toy_package.toys:arrays"
    assert train.images.flatten().tolist() == list(range(24))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.sample_ids.tolist() == list(range(6))
    assert test.num_samples == 2
    assert test.class_names == ("0", "1", "2")  # the train split's
    assert capfd.readouterr().out == ""


def test_a_function_may_return_tensors_with_ids() -> None:
    train = _load("toys:tensors")
    assert train.images.shape == (6, 1, 2, 2)
    assert train.sample_ids.tolist() == [50, 51, 52, 53, 54, 55]


def test_a_function_may_take_the_root_and_name_the_classes(tmp_path: Path) -> None:
    assert _load("toys:rooted", root=str(tmp_path)).class_names == (str(tmp_path), "b", "c")


def test_keywords_of_a_function_attract_no_root() -> None:
    assert _load("toys:any_keywords").num_samples == 6


def test_a_function_may_return_a_torch_dataset() -> None:
    train = _load("toys:pairs", channels=3, image_size=4)
    assert train.class_names == ("a", "b", "c")
    assert train.images.shape == (6, 3, 4, 4)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a registered data set."""
    monkeypatch.setattr(DATASETS, "_registered", {})

    @DATASETS.register("my_gray-images")
    def gray(split: str, root: str) -> Any:
        return np.full((4, 2, 2), 7, np.uint8), np.array([0, 1, 0, 1]), np.arange(4) + 3, ("x", root)

    return "my_gray-images"


def test_a_registered_data_set_loads_by_name(registered: str, tmp_path: Path) -> None:
    train = load_dataset(DataConfig(name=registered, root=str(tmp_path)), "train")
    assert train.name == registered
    assert train.class_names == ("x", str(tmp_path))
    assert train.sample_ids.tolist() == [3, 4, 5, 6]


def test_a_registered_data_set_is_suggested(registered: str) -> None:
    with pytest.raises(UnknownDataError, match="did you mean 'my_gray-images'"):
        load_dataset(DataConfig(name="my_gray_images"), "train")


@pytest.mark.parametrize("name", ["digits", "CIFAR100", "npz", "imagefolder"])
def test_a_built_in_data_set_cannot_be_replaced(name: str) -> None:
    with pytest.raises(RecipeError, match=f"there is a data set called '{name}' already"):
        DATASETS.register(name)(lambda split: None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("toys", "must read python:package.module:function"),
        ("toys:", "must read python:package.module:function"),
        ("toyz:arrays", "the module toy_package.toyz cannot be imported (ModuleNotFoundError"),
        ("failing:arrays", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("toys:array", "has no function array; did you mean 'arrays'"),
        ("toys:IMAGES", "has no function IMAGES"),
        ("toys:lists", "labels must be a numpy array or a tensor, found list"),
        ("toys:one_thing", "must return (images, labels)"),
        ("toys:wrong_names", "class_names must be strings"),
        ("toys:broken", "the function failed on 'train' (RuntimeError: lost and gone)"),
        ("toys:equal_ids", "have the same id 0"),
    ],
)
def test_invalid_function_error_is_one_line(function: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        _load(function)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
