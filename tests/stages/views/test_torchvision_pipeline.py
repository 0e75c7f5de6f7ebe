from __future__ import annotations

import hashlib
import random
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.torchvision_pipeline import build_transform
from kdpipe.stages.views.transforms_engine import apply_transform, check_deterministic, transform_identity

RGB = np.random.default_rng(0).integers(0, 256, (3, 32, 28), dtype=np.uint8)
GRAY = RGB[:1]

TABLES: list[dict[str, Any]] = [
    {"name": "AugMix", "severity": 3, "fill": [1, 2, 3]},
    {"name": "AutoAugment", "policy": "cifar10", "interpolation": "bilinear"},
    {"name": "CenterCrop", "size": 20},
    {"name": "ColorJitter", "brightness": [0.5, 1.5], "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    {"name": "Compose", "transforms": [{"name": "Resize", "size": 24}, {"name": "RandomCrop", "size": [24, 20]}]},
    {"name": "ElasticTransform", "alpha": 20.0},
    {"name": "GaussianBlur", "kernel_size": 3, "sigma": [0.1, 2.0]},
    {"name": "Grayscale", "num_output_channels": 3},
    {"name": "Identity"},
    {"name": "JPEG", "quality": [20, 90]},
    {"name": "Pad", "padding": [1, 2, 3, 4], "fill": [1, 2, 3]},
    {"name": "RGB"},
    {"name": "RandAugment", "num_ops": 2, "magnitude": 9},
    {"name": "RandomAdjustSharpness", "sharpness_factor": 2.0},
    {"name": "RandomAffine", "degrees": [-10, 10], "translate": [0.1, 0.1], "scale": [0.9, 1.1], "shear": 5},
    {"name": "RandomApply", "p": 0.3, "transforms": [{"name": "GaussianBlur", "kernel_size": 3}]},
    {"name": "RandomChannelPermutation"},
    {"name": "RandomChoice", "p": [0.2, 0.8], "transforms": [{"name": "RandomInvert"}, {"name": "RandomEqualize"}]},
    {"name": "RandomCrop", "size": 32, "padding": 4, "padding_mode": "reflect"},
    {"name": "RandomErasing", "value": "random"},
    {"name": "RandomGrayscale", "p": 0.5},
    {"name": "RandomHorizontalFlip"},
    {
        "name": "RandomOrder",
        "transforms": [{"name": "RandomSolarize", "threshold": 128}, {"name": "RandomAutocontrast"}],
    },
    {"name": "RandomPerspective", "distortion_scale": 0.5},
    {"name": "RandomPhotometricDistort", "brightness": [0.8, 1.2]},
    {"name": "RandomPosterize", "bits": 3},
    {"name": "RandomResize", "min_size": 20, "max_size": 40},
    {"name": "RandomResizedCrop", "size": [24, 24], "scale": [0.2, 1.0], "interpolation": "bicubic"},
    {"name": "RandomRotation", "degrees": 30, "interpolation": "bilinear"},
    {"name": "RandomVerticalFlip", "p": 1.0},
    {"name": "RandomZoomOut", "side_range": [1.0, 2.0]},
    {"name": "Resize", "size": [20, 24], "interpolation": "nearest-exact"},
    {"name": "ScaleJitter", "target_size": [24, 24]},
    {"name": "ToDtype", "dtype": "uint8"},
    {"name": "TrivialAugmentWide"},
]

MODULE = """
import random

import numpy as np
import torch
from torchvision.transforms import v2

pipeline = v2.Compose([v2.RandomCrop(16), v2.RandomHorizontalFlip()])
constant = 3


class Inverts(torch.nn.Module):
    def forward(self, image):
        return v2.functional.invert(image)


def make():
    print("building")
    return lambda image: np.asarray(image)[::-1]


def make_drawn():
    mask = random.randrange(256) ^ np.random.randint(256) ^ int(torch.randint(256, ()))
    return lambda image: np.asarray(image) ^ np.uint8(mask)


def takes(image):
    return image


def broken():
    raise KeyError("lost\\nand gone")


def gives_nothing():
    return None
"""


def refuses(text: str) -> Any:
    return pytest.raises(RecipeError, match=re.escape(text))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, in the current folder."""
    file = tmp_path / "own_views.py"
    file.write_text(textwrap.dedent(MODULE))
    (tmp_path / "failing_views.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_views", raising=False)
    return file


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["name"])
def test_a_table_becomes_the_transform_of_its_name(table: dict[str, Any]) -> None:
    transform = build_transform([table])
    assert isinstance(transform, v2.Compose)
    assert type(transform.transforms[0]) is getattr(v2, table["name"])
    check_deterministic(transform, RGB)


@pytest.mark.parametrize("pixels", [RGB, GRAY])
def test_table_equals_the_constructor(pixels: Any) -> None:
    built = build_transform(
        [
            {"name": "RandomResizedCrop", "size": 20, "scale": [0.2, 1.0], "interpolation": "bicubic"},
            {"name": "RandomApply", "p": 0.8, "transforms": [{"name": "ColorJitter", "brightness": 0.5}]},
            {"name": "AutoAugment", "policy": "svhn"},
            {"name": "ToImage"},
            {"name": "ToDtype", "dtype": "float32", "scale": True},
        ]
    )
    written = v2.Compose(
        [
            v2.RandomResizedCrop(20, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomApply([v2.ColorJitter(brightness=0.5)], p=0.8),
            v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    for sample in range(8):
        assert torch.equal(apply_transform(built, pixels, sample, 0, 0), apply_transform(written, pixels, sample, 0, 0))


def test_lists_become_the_tuples_that_torchvision_documents() -> None:
    built: Any = build_transform([{"name": "RandomResizedCrop", "size": 8, "scale": [0.2, 1.0]}])
    assert built.transforms[0].scale == (0.2, 1.0)


def test_no_operations_are_the_identity() -> None:
    assert np.array_equal(apply_transform(build_transform([]), RGB, 0, 0, 0).numpy(), RGB)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "RandomCrob", "size": 3}, "no transform 'RandomCrob'; did you mean 'RandomCrop'?"),
        ({"name": "zzzzzzzz"}, "no transform 'zzzzzzzz'; see its documentation"),
        ({"name": "Transform"}, "no transform 'Transform'"),
        ({"name": "InterpolationMode", "value": "bilinear"}, "no transform 'InterpolationMode'"),
        ({"name": "functional"}, "no transform 'functional'"),
        ({"size": 3}, "expected a table such as { name = 'RandomCrop', size = 32 }, found {'size': 3}"),
        ({"name": 3}, "expected a table such as"),
        ("RandomCrop", "expected a table such as { name = 'RandomCrop', size = 32 }, found 'RandomCrop'"),
        ({"name": "MixUp"}, "MixUp mixes samples: use [views.mix]."),
        ({"name": "CutMix", "alpha": 1.0}, "CutMix mixes samples: use [views.mix]."),
        ({"name": "Normalize", "mean": [0.5], "std": [0.5]}, "Normalize belongs to teacher.mean/std and student.mean"),
        ({"name": "SanitizeBoundingBoxes"}, "works on bounding boxes or key points, not on images"),
        ({"name": "UniformTemporalSubsample", "num_samples": 2}, "works on videos"),
        ({"name": "TenCrop", "size": 3}, "returns several images"),
        ({"name": "Lambda", "lambd": "x"}, "views.transform = 'python:MODULE:FUNCTION'"),
        ({"name": "RandomCrop", "sise": 3}, "RandomCrop has no argument 'sise'; did you mean 'size'?"),
        ({"name": "RandomHorizontalFlip", "zzz": 3}, "RandomHorizontalFlip has no argument 'zzz'; available: p."),
        ({"name": "ToImage", "zzz": 3}, "ToImage has no argument 'zzz'; available: none."),
        ({"name": "RandomCrop", "padding": 3}, "RandomCrop requires 'size'."),
        (
            {"name": "RandomHorizontalFlip", "p": 2.0},
            "RandomHorizontalFlip cannot be built from {'p': 2.0} (ValueError: `p`",
        ),
        ({"name": "RandomCrop", "size": "big"}, "RandomCrop cannot be built from {'size': 'big'} (ValueError"),
        (
            {"name": "Resize", "size": 3, "interpolation": "bilinaer"},
            "Resize has no interpolation 'bilinaer'; did you mean 'bilinear'?",
        ),
        ({"name": "AutoAugment", "policy": "mnist"}, "has no policy 'mnist'; available: imagenet, cifar10, svhn."),
        ({"name": "ToDtype", "dtype": "int9"}, "ToDtype has no dtype 'int9'"),
        ({"name": "RandomApply", "transforms": []}, "cannot be built from {'transforms': []} (ValueError"),
        (
            {"name": "RandomApply", "transforms": "RandomCrop"},
            "views.operations.1.transforms: expected a list of tables",
        ),
        (
            {"name": "RandomApply", "transforms": [{"name": "ToImage"}, {"name": "RandomCrop"}]},
            "views.operations.1.transforms.1: RandomCrop requires 'size'",
        ),
        ({"name": "RandomOrder", "transforms": [{"name": "MixUp"}]}, "views.operations.1.transforms.0: MixUp mixes"),
    ],
)
def test_invalid_table_error_is_one_line(table: Any, message: str) -> None:
    with refuses(message) as raised:
        build_transform([{"name": "ToImage"}, table])
    assert str(raised.value).startswith("views.operations.1")
    assert "\n" not in str(raised.value)


def test_a_module_is_the_transform_itself(own: Path) -> None:
    assert apply_transform(build_transform([], "python:own_views:pipeline"), RGB, 0, 0, 0).shape == (3, 16, 16)


def test_a_function_is_called_for_the_transform(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert np.array_equal(
        apply_transform(build_transform([], "python:own_views:make"), RGB, 0, 0, 0).numpy(), RGB[:, ::-1]
    )
    inverts = build_transform((), "python:own_views:Inverts")
    assert np.array_equal(apply_transform(inverts, RGB, 0, 0, 0).numpy(), 255 - RGB)
    assert capfd.readouterr().out == ""


def test_numbers_drawn_while_building_are_fixed(own: Path) -> None:
    views = []
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        views.append(apply_transform(build_transform([], "python:own_views:make_drawn"), RGB, 0, 0, 0))
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("python:own_views", "must read python:package.module:function."),
        ("own_views:make", "must read python:package.module:function."),
        ("python:no_views_here:make", "the module no_views_here cannot be imported (ModuleNotFoundError"),
        ("python:failing_views:make", "the module failing_views cannot be imported (ZeroDivisionError"),
        ("python:own_views:pipelin", "own_views has no function pipelin; did you mean 'pipeline'"),
        ("python:own_views:constant", "own_views has no function constant"),
        ("python:own_views:takes", "missing 1 required positional argument: 'image'); it is called once, without"),
        ("python:own_views:broken", "the function failed (KeyError: 'lost\\nand gone')"),
        ("python:own_views:gives_nothing", "the function returned NoneType, expected a pipeline"),
    ],
)
def test_invalid_reference_error_is_one_line(own: Path, reference: str, message: str) -> None:
    with refuses(message) as raised:
        build_transform([], reference)
    assert str(raised.value).startswith(f"views.transform={reference!r}")
    assert "\n" not in str(raised.value)


def test_operations_and_a_reference_exclude_each_other(own: Path) -> None:
    with refuses("remove one of them"):
        build_transform([{"name": "ToImage"}], "python:own_views:pipeline")


def test_a_reference_describes_itself_with_a_digest_of_its_file(own: Path) -> None:
    config = Views(engine="transforms", transform="python:own_views:make")
    described = transform_identity(config)
    assert described["transform"] == "python:own_views:make"
    assert described["transform_source_sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    own.write_text(own.read_text() + "# edited\n")
    with pytest.warns(UserWarning, match=r"own_views.py was edited after it was imported"):
        assert transform_identity(config) == described  # the code that runs
    del sys.modules["own_views"]
    assert transform_identity(config) != described


def test_a_reference_without_a_file_is_not_described(own: Path) -> None:
    with refuses("later edits of its source could not be noticed, since its module cannot be read"):
        transform_identity(Views(engine="transforms", transform="python:sys:exc_info"))
    build_transform([], "python:own_views:make")
    own.unlink()
    with refuses(f"later edits of its source could not be noticed, since {own} cannot be read"):
        transform_identity(Views(engine="transforms", transform="python:own_views:make"))
