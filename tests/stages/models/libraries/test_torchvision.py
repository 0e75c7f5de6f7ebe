"""torchvision's classifiers by name: which are taken, with which arguments, and how they get published weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model, list_models
from kdpipe.stages.models.weights.state_dict import count_parameters


def build(
    name: str,
    *,
    channels: int = 3,
    num_classes: int = 10,
    weights: str | None = None,
    notify: Callable[[str], None] = print,
    **args: Any,
) -> nn.Module:
    config = ModelConfig(name=name, args=args, weights=weights)
    return build_model(
        config, num_classes=num_classes, in_channels=channels, image_size=(32, 32), seed=0, notify=notify
    )


def blueprint(name: str, **args: Any) -> nn.Module:
    """The network without memory for its weights: nothing is drawn, nothing computed, but shapes are checked."""
    with torch.device("meta"):
        return build(name, **args)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of downloaded checkpoints, empty; nothing can be downloaded into it."""

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(hub: Path, name: str, content: object) -> None:
    torch.save(content, hub / Path(models.get_model_weights(name).DEFAULT.url).name)


def all_but(entries: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in entries.items() if not key.startswith(head)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_plain_name_is_the_small_image_network() -> None:
    ours, published = blueprint("mobilenet_v2"), blueprint("torchvision:mobilenet_v2")
    assert isinstance(published, models.MobileNetV2)
    assert not isinstance(ours, models.MobileNetV2)
    assert count_parameters(ours) < count_parameters(published)
    assert isinstance(blueprint("resnet18"), models.ResNet)
    assert isinstance(blueprint("torchvision:resnet18"), models.ResNet)


def test_every_classifier_lists_its_arguments() -> None:
    """No builder of this torchvision is outside what the argument check knows: all refuse, none fails otherwise."""
    names = [name for name in list_models() if hasattr(models, name.removeprefix("torchvision:"))]
    names = [name for name in names if name.startswith("torchvision:") or f"torchvision:{name}" not in list_models()]
    assert len(names) > 70
    for name in names:
        with pytest.raises(ModelError, match="has no argument 'no_such_thing': it takes .*dropout|it takes"):
            build(name, no_such_thing=1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fasterrcnn_resnet50_fpn", "not a plain image classifier"),
        ("deeplabv3_resnet50", "not a plain image classifier"),
        ("r3d_18", "not a plain image classifier"),
        ("quantized_resnet18", "not a plain image classifier"),
        ("alexnet", "alexnet cannot take images of 3 x 32 x 32 (RuntimeError: "),
        ("vit_b_32", "vit_b_32 cannot take images of 3 x 32 x 32 (AssertionError: "),
    ],
)
def test_networks_that_cannot_be_used(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=re.escape(sentence)):
        blueprint(name)


def test_of_auxiliary_heads_the_main_one_is_used() -> None:
    assert build("googlenet")(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(ModelError, match=r"weights of inception_v3 need args\.transform_input = true"):
        build("inception_v3", weights="published")


def test_one_channel_is_refused_with_the_setting_to_change() -> None:
    wanted = "resnet18 takes 3 channels, the data has 1: set data.channels = 3."
    with pytest.raises(ModelError, match=re.escape(wanted)):
        build("resnet18", channels=1)


def test_arguments_reach_the_network() -> None:
    half, full = blueprint("mobilenet_v3_small", width_mult=0.5), blueprint("mobilenet_v3_small")
    assert count_parameters(half) < count_parameters(full)
    assert blueprint("efficientnet_b0", dropout=0.7).classifier[0].p == 0.7
    assert blueprint("vit_b_32", image_size=32).image_size == 32


@pytest.mark.parametrize(
    "args", [{"width_per_group": "wide"}, {"zero_init_residual": 1, "block": 3}, {"progress": True}]
)
def test_wrong_arguments(args: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"resnet18 cannot be built with args|it takes groups, |set by kdpipe itself"):
        build("resnet18", **args)


@pytest.mark.parametrize(
    ("name", "head"), [("mobilenet_v3_small", "classifier.3."), ("squeezenet1_1", "classifier.1.")]
)
def test_published_weights_with_a_fresh_head(hub: Path, name: str, head: str) -> None:
    torch.manual_seed(7)
    published = models.get_model(name).state_dict()
    publish(hub, name, published)
    notices: list[str] = []
    model = build(name, weights="published", num_classes=10, notify=notices.append)
    assert notices == [
        f"the published weights of {name} are of 1,000 classes, the data has 10: the classifier is new, drawn from the "
        "seed."
    ]
    assert_same(all_but(model.state_dict(), head), all_but(published, head))
    assert model.state_dict()[f"{head}weight"].shape[0] == 10
    assert_same(build(name, weights="published", num_classes=10).state_dict(), model.state_dict())


def test_published_weights_keep_their_head_where_it_fits(hub: Path) -> None:
    torch.manual_seed(7)
    published = models.mobilenet_v3_small().state_dict()
    publish(hub, "mobilenet_v3_small", published)
    assert_same(build("mobilenet_v3_small", weights="published", num_classes=1000).state_dict(), published)


def test_published_densenets_have_old_names(hub: Path) -> None:
    args: dict[str, Any] = {"bn_size": 1}
    published = models.densenet121(**args).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in published.items()}
    assert old.keys() != published.keys()
    publish(hub, "densenet121", old)
    assert_same(build("densenet121", weights="published", num_classes=1000, **args).state_dict(), published)


def test_published_weights_do_not_fit_other_arguments(hub: Path) -> None:
    publish(hub, "mobilenet_v3_small", models.mobilenet_v3_small().state_dict())
    with pytest.raises(
        ModelError, match=r"the published weights of mobilenet_v3_small cannot be loaded .* is stored as"
    ):
        build("mobilenet_v3_small", weights="published", width_mult=0.5)


def test_published_weights_out_of_reach(hub: Path) -> None:
    with pytest.raises(
        ModelError, match=r"weights of resnet18 cannot be loaded from https://.*no network.*\$TORCH_HOME"
    ):
        build("resnet18", weights="published")


def test_a_cached_checkpoint_with_pickled_objects_is_refused(hub: Path) -> None:
    publish(hub, "resnet18", models.resnet18())
    with pytest.raises(ModelError, match="weights of resnet18 cannot be loaded from .*UnpicklingError"):
        build("resnet18", weights="published")
