"""Image classifiers of transformers: folders, weights, classes, input scaling, and rebuilding without the folder."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.build import ModelConfig, architecture, build_model
from kdpipe.stages.models.classes import build_for_classes
from kdpipe.stages.models.libraries.by_name import preprocessing_of_weights, scaling_of_network, scaling_of_weights

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
SHAPE: dict[str, Any] = {"in_channels": 3, "image_size": (16, 16), "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ViT of three classes, with its weights and image processor."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, image_size=16, id2label={0: "cat", 1: "dog", 2: "tench, Tinca tinca"})
    transformers.ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2], "size": {"height": 16, "width": 16}})
    )
    return path


@pytest.mark.parametrize(
    ("processor", "made"),
    [
        ({"size": {"height": 16, "width": 16}, "resample": 2}, ((16, 16), None, "bilinear")),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3}, ((224, 224), 0.875, "bicubic")),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, ((256, 256), None, None)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, ((224, 224), 0.9, None)),
        ({}, (None, None, None)),
    ],
)
def test_an_image_processor_states_size_and_crop(processor, made, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert astuple(preprocessing_of_weights(f"hf:{tmp_path}")) == made


def test_published_weights_of_a_folder(folder):
    config = ModelConfig(name=f"hf:{folder}", weights="published")
    said: list[str] = []
    model = build_for_classes(config, ["cat", "dog", "tench"], **SHAPE, notify=said.append).eval()
    images = torch.rand(2, 3, 16, 16)
    own = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(model(images), own(images).logits)
    assert said == []
    [scaling] = scaling_of_weights(config.name, 3).values()
    assert scaling.mean == (0.4, 0.5, 0.6)
    assert scaling_of_network(own, 3) == scaling_of_weights(config.name, 3)


def test_the_record_rebuilds_the_network_without_the_folder(folder):
    config = ModelConfig(name=f"hf:{folder}", weights="published")
    record = json.loads(json.dumps(architecture(config, 3, 3, (16, 16))))
    again = build_model(ModelConfig(name="hf:gone", args=record["args"]), num_classes=3, **SHAPE)
    again.load_state_dict(build_model(config, num_classes=3, **SHAPE).state_dict())


def test_classes_are_compared_by_name(folder):
    config = ModelConfig(name=f"hf:{folder}", weights="published")
    with pytest.raises(RecipeError, match="class 0 of the data is 'dog', which is output 1 of hf:"):
        build_for_classes(config, ["dog", "cat", "tench"], **SHAPE)
    said: list[str] = []
    build_for_classes(config, ["a", "b", "c"], **SHAPE, notify=said.append)
    assert "have no name in common: their order is not checked" in said[0]
    chosen = ModelConfig(name=config.name, weights="published", classes="published")
    whole, rows = build_model(config, num_classes=3, **SHAPE), build_for_classes(chosen, ["tench", "cat"], **SHAPE)
    assert torch.equal(rows.get_submodule("classifier").weight, whole.get_submodule("classifier").weight[[2, 0]])
    new = build_model(config, num_classes=5, **SHAPE, notify=said.append)
    assert new(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert "of 3 classes, the data has 5: the classifier is new" in said[-1]


def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    large: dict[str, Any] = {**SHAPE, "image_size": (32, 32)}
    with pytest.raises(ModelError, match=r"position_embeddings in the weights has another shape.*set data.image_size"):
        build_model(ModelConfig(name=f"hf:{folder}", weights="published"), num_classes=3, **large)
    with pytest.raises(ModelError, match=r"hf:nobody/nothing cannot be loaded .*fetch config.json"):
        build_model(ModelConfig(name="hf:nobody/nothing", weights="published"), num_classes=3, **SHAPE)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="published weights of hf:.* cannot be loaded"):
        build_model(ModelConfig(name=f"hf:{tmp_path}", weights="published"), num_classes=3, **SHAPE)


TOWERS: list[tuple[str, dict[str, Any], int]] = [
    ("ViTModel", {"model_type": "vit", **TINY}, 16),
    ("Dinov2Model", {"model_type": "dinov2", **TINY}, 16),
    ("CLIPVisionModelWithProjection", {"model_type": "clip", "projection_dim": 6, "vision_config": TINY}, 6),
    ("SiglipVisionModel", {"model_type": "siglip", "vision_config": TINY}, 16),
]


@pytest.mark.parametrize(("kind", "args", "width"), TOWERS)
def test_without_a_classifier_it_returns_embeddings(kind, args, width):
    model = build_model(ModelConfig(name="hf:made", args=args), num_classes=0, **SHAPE).eval()
    assert type(model).__name__ == kind
    found = model(torch.rand(2, 3, 16, 16))
    assert found.shape == (2, width)
    assert not torch.equal(found[0], found[1])


def test_published_weights_without_their_classifier(folder):
    config = ModelConfig(name=f"hf:{folder}", weights="published")
    model, images = build_model(config, num_classes=0, **SHAPE).eval(), torch.rand(2, 3, 16, 16)
    own = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(model(images), own.vit(images).last_hidden_state[:, 0])
    record = json.loads(json.dumps(architecture(config, 0, 3, (16, 16))))
    again = build_model(ModelConfig(name="hf:gone", args=record["args"]), num_classes=0, **SHAPE)
    again.load_state_dict(model.state_dict())
