"""Teachers whose weights are taken as they are: what is known of them, and what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_run import TEACHER, squares, tiny_context
from torch import Tensor, nn

from kdpipe.pipeline.steps import train_teacher
from kdpipe.stages.context import StageContext
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.given_teacher import is_as_expected, require_given
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.libraries.by_name import Preprocessing
from kdpipe.stages.models.normalization import IMAGENET, Normalization
from kdpipe.stages.models.user_models import MODELS
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.teacher import TeacherConfig, build_teacher

pytestmark = pytest.mark.usefixtures("without_onnx")

HALF = {"mean": (0.5,), "std": (0.5,)}


class Corners(nn.Module):
    """Finds the bright corner of `squares` exactly, in images of mean = std = 0.5 only."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        # Brighter than the threshold counts: with another scaling it is passed everywhere, or nowhere.
        means = nn.functional.avg_pool2d(images[:, :1], 4).flatten(1)
        return ((means > 0) * torch.tensor([4.0, 3.0, 2.0, 1.0], device=images.device) + self.bias)[:, self.order]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TeacherConfig]:
    """Register a factory, and return a teacher's configuration of it."""
    monkeypatch.setattr(MODELS, "_registered", {})

    def register(build: Callable[[], nn.Module] = Corners, **keys: Any) -> TeacherConfig:
        MODELS._registered.pop("given", None)
        MODELS.register("given")(build)
        return TeacherConfig(model=ModelConfig(name="given"), **keys)

    return register


def context_of(tmp_path: Path, warnings: list[str] | None = None) -> StageContext:
    def report(event: ProgressEvent) -> None:
        if warnings is not None and event.unit == "warning":
            warnings.append(event.job)

    return tiny_context(tmp_path, RunMonitor(report), test_set=squares(320, 1, "test"))


# --- Input scaling


def test_an_unknown_scaling_is_refused(tmp_path, given):
    with pytest.raises(RecipeError, match=r"the input scaling of the network given is not known.*teacher\.mean and"):
        train_teacher(given(), 0, context_of(tmp_path))
    assert not (tmp_path / "teacher").exists()
    assert train_teacher(given(**HALF), 0, context_of(tmp_path))["accuracy"] == 1


def test_networks_may_state_their_scaling(tmp_path, given):
    def with_config() -> nn.Module:
        model = Corners()
        model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}  # as timm's networks
        return model

    result = train_teacher(given(with_config), 0, context_of(tmp_path))
    assert result["accuracy"] == 1
    assert result["identity"]["normalization"] == {"mean": [0.5], "std": [0.5]}
    warnings: list[str] = []
    with pytest.raises(RecipeError):
        train_teacher(given(with_config, mean=(0.0,), std=(1.0,)), 0, context_of(tmp_path / "other", warnings))
    assert "timm's configuration of the network states mean = [0.5] and std = [0.5]" in warnings[0]


def test_weights_for_another_image_size_are_told(tmp_path, monkeypatch):
    made = Preprocessing((224, 224), 0.875, "bicubic")
    monkeypatch.setattr("kdpipe.stages.given_teacher.preprocessing_of_weights", lambda name: made)
    warnings: list[str] = []
    context, config = context_of(tmp_path, warnings), ModelConfig(name="timm:any", weights="any.safetensors")
    teacher = ModelBundle(Corners(), {}, Normalization((0.5,), (0.5,)))
    monkeypatch.setattr("kdpipe.stages.given_teacher.stated_by_weights", lambda *_: {"x": teacher.normalize})
    require_given(TeacherConfig(model=config), teacher, context)
    assert ["are for images of 224 x 224 pixels, and these have 8 x 8" in warning for warning in warnings] == [True]
    monkeypatch.setattr("kdpipe.stages.given_teacher.ImageFiles", torch.Tensor)
    require_given(TeacherConfig(model=config), teacher, context)
    assert warnings[-1].endswith("unless the images are cropped already, set data.test_crop = 0.875.")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}),
        ("preprocessor_config.json", {"image_mean": 0.5, "image_std": 0.5}),
        ("net.json", {"mean": [0.5], "std": [0.5]}),
    ],
)
def test_files_beside_weights_may_state_the_scaling(tmp_path, given, name, content):
    save_file({"bias": torch.zeros(4)}, tmp_path / "net.safetensors")
    config = given()
    config = replace(config, model=replace(config.model, weights=str(tmp_path / "net.safetensors")))
    with pytest.raises(RecipeError, match="the weights .*net.safetensors is not known"):
        train_teacher(config, 0, context_of(tmp_path / "run"))
    (tmp_path / name).write_text(json.dumps(content))
    assert build_teacher(config, 0, context_of(tmp_path)).normalize == Normalization((0.5,), (0.5,))
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.1], "std": [0.5]}))
    if name != "config.json":
        with pytest.raises(RecipeError, match=r"state two input scalings \(.*config.json: mean = \[0.1\]"):
            train_teacher(config, 0, context_of(tmp_path / "run"))


def test_weights_of_kdpipe_state_their_scaling(tmp_path):
    context = context_of(tmp_path)
    trained = train_teacher(replace(TEACHER, mean=(0.25,), std=(0.125,)), 0, context)
    model = replace(TEACHER.model, weights=str(tmp_path / "teacher" / "model.safetensors"))
    teacher = TeacherConfig(model=model, expected_accuracy=0)
    result = train_teacher(teacher, 0, context_of(tmp_path / "other"))
    assert result["identity"] == trained["identity"]


def test_a_new_classifier_is_refused(tmp_path):
    given = TeacherConfig(model=ModelConfig(name="resnet18", weights="published"))
    bundle = ModelBundle(nn.Identity(), {}, IMAGENET)
    with pytest.raises(RecipeError, match=r"the classifier of the published weights of resnet18 is new and random"):
        require_given(given, bundle, tiny_context(tmp_path))
    require_given(replace(given, train=TEACHER.train), bundle, tiny_context(tmp_path))


# --- Accuracy


def test_another_scaling_is_found(tmp_path, given):
    wrong = given(mean=(0.0,), std=(1.0,))
    with pytest.raises(RecipeError) as error:
        train_teacher(wrong, 0, context_of(tmp_path))
    assert "With mean = [0.5] and std = [0.5] (pixels from -1 to 1), it reaches 100.0 % of a sample of 320" in str(
        error.value
    )
    assert "set teacher.mean = [0.5] and teacher.std = [0.5]" in str(error.value)
    accuracy = float(str(error.value).split("teacher.expected_accuracy = ")[1].rstrip("."))
    accepted = train_teacher(replace(wrong, expected_accuracy=accuracy), 0, context_of(tmp_path))
    assert accepted["accuracy"] == pytest.approx(accuracy / 100, abs=1e-4)


def test_another_class_order_is_found(tmp_path, given):
    with pytest.raises(RecipeError, match=r"in another order \(output 0 is 'b', output 1 is 'a'\), it reaches 100.0 %"):
        train_teacher(given(lambda: Corners((1, 0, 2, 3)), **HALF), 0, context_of(tmp_path))


def test_a_teacher_at_chance_is_refused(tmp_path, given):
    constant = given(lambda: nn.Sequential(Corners(), nn.Threshold(100, 0)), **HALF)
    with pytest.raises(RecipeError, match=r"the teacher reaches (.*) % of 320 test images; guessing would reach \1 %"):
        train_teacher(constant, 0, context_of(tmp_path))


def test_an_expected_accuracy_is_held_to(tmp_path, given):
    teacher = given(**HALF, expected_accuracy=99.9)
    assert train_teacher(teacher, 0, context_of(tmp_path))["accuracy"] == 1
    some = replace(given(lambda: Corners((0, 1, 3, 3)), **HALF), expected_accuracy=99.9)
    with pytest.raises(RecipeError, match=r"99.9 % were expected \(teacher.expected_accuracy\)"):
        train_teacher(some, 0, context_of(tmp_path / "low"))
    few = replace(context_of(tmp_path / "few"), test_set=squares(8, 3, "test"))
    trained = replace(TEACHER, expected_accuracy=100)
    with pytest.raises(RecipeError, match="train it for longer, or expect less. The training is kept"):
        train_teacher(trained, 0, few)
    assert train_teacher(replace(trained, expected_accuracy=0), 0, few)["num_epochs"] == 2


def test_good_teachers_are_not_suspected(tmp_path, given):
    """Few images, and an accuracy that other scalings cannot raise."""
    for number, test_set in enumerate((squares(3, 3, "test"), squares(320, 4, "test"))):
        if number:
            test_set.labels[:100] = (test_set.labels[:100] + 1) % 4  # wrong labels: 69 % is all that can be reached
        context = tiny_context(tmp_path / str(number), test_set=test_set)
        result = train_teacher(given(**HALF), 0, context)
        assert result["accuracy"] > 0.6
        assert result["onnx_bytes"] is None  # a given teacher is not exported, unless teacher.export says so


# --- Outputs


def test_log_probabilities_are_told(tmp_path, given):
    warnings: list[str] = []
    teacher = given(lambda: nn.Sequential(Corners(), nn.LogSoftmax(1)), **HALF)
    assert train_teacher(teacher, 0, context_of(tmp_path, warnings))["accuracy"] == 1
    assert "returns log-probabilities" in warnings[0]


def test_probabilities_of_real_images_are_refused(tmp_path, given):
    class Hidden(Corners):
        """A softmax that blank images do not show."""

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits.softmax(1) if len(images) > 2 else logits

    with pytest.raises(RecipeError, match="the teacher's outputs are probabilities"):
        train_teacher(given(Hidden, **HALF), 0, context_of(tmp_path))


def test_a_network_trained_to_chance_is_told(tmp_path):
    warnings: list[str] = []
    untrained = replace(TEACHER, train=replace(TEACHER.train, epochs=1, lr=1e-9))
    result = train_teacher(untrained, 1, context_of(tmp_path, warnings))
    assert result["accuracy"] < 0.4
    (warning,) = warnings
    assert (
        f"is not clearly above chance: {100 * result['accuracy']:.2f} % of 320 test images, where guessing would reach"
        in warning
    )


def test_a_new_classifier_is_not_taken_as_it_is(tmp_path):
    source = tiny_context(tmp_path).build_model(TEACHER.model, 1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = replace(TEACHER.model, weights=str(tmp_path / "w.safetensors"), fresh_head=True)
    with pytest.raises(RecipeError, match=r"w.safetensors is new and random, .* train the teacher"):
        train_teacher(TeacherConfig(model=model, **HALF), 0, tiny_context(tmp_path))


# --- The teacher of another run


@pytest.mark.parametrize(
    ("here", "there", "trained", "fits"),
    [
        (None, None, False, True),
        (None, 10.0, False, False),  # it may have a wrong scaling, which was not looked for
        (None, 10.0, True, True),
        (50.0, None, False, True),
        (51.0, None, True, True),  # within the error of the test images
        (60.0, None, False, False),
        (60.0, None, True, False),
    ],
)
def test_a_teacher_of_another_run_must_be_as_accurate(tmp_path, here, there, trained, fits):
    (tmp_path / "recipe.json").write_text(json.dumps({"teacher": {"expected_accuracy": there}}))
    config = replace(TEACHER, train=TEACHER.train if trained else None, expected_accuracy=here)
    result = {"accuracy": 0.5, "examined": {"per_class": [{"num_samples": 10_000}]}}
    assert is_as_expected(config, tmp_path, result) is fits
