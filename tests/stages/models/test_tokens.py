"""Parts of the tokens of vision transformers as features: timm's, transformers' and torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import extract_features, feature_shapes
from kdpipe.stages.models.tokens import is_headless, num_prefix_tokens


def timm_vit(**args: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    tiny = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 12, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **(tiny | args))
    return model.eval()


def hf_deit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16, "patch_size": 4}
    model: nn.Module = transformers.DeiTForImageClassification(transformers.DeiTConfig(**sizes, num_hidden_layers=1))
    return model.eval()


def torchvision_vit() -> nn.Module:
    return VisionTransformer(16, 4, num_layers=1, num_heads=2, hidden_dim=12, mlp_dim=8, num_classes=3).eval()


CASES: list[tuple[Callable[[], nn.Module], str, int]] = [
    (timm_vit, "blocks.0", 1),
    (lambda: timm_vit(reg_tokens=2), "blocks.0", 3),
    (hf_deit, "deit.layers.0", 2),
    (torchvision_vit, "encoder.layers.encoder_layer_0", 1),
]


@pytest.mark.parametrize(("build", "layer", "before"), CASES)
def test_parts_are_those_of_the_tokens(build, layer, before):
    model, images = build(), torch.rand(2, 3, 16, 16)
    parts = [layer, f"{layer}.class_token", f"{layer}.patch_mean", f"{layer}.patch_map"]
    with torch.no_grad(), extract_features(model, parts) as extractor:
        tokens, class_token, mean, grid = (_run(extractor, images)[part] for part in parts)
    assert num_prefix_tokens(model) == before
    assert tokens.shape == (2, before + 16, 12)
    assert torch.equal(class_token, tokens[:, 0])
    assert torch.allclose(mean, tokens[:, before:].mean(1))
    assert grid.shape == (2, 12, 4, 4)
    assert torch.equal(grid[:, :, 1, 2], tokens[:, before + 6])


def _run(extractor: Callable[[Tensor], object], images: Tensor) -> dict[str, Tensor]:
    output = extractor(images)
    return dict(getattr(output, "features"))  # noqa: B009


def test_attention_of_timm_without_its_fused_kernel():
    model, images = timm_vit(), torch.rand(2, 3, 16, 16)
    attn = model.get_submodule("blocks.0.attn")
    fused = attn.fused_attn
    with torch.no_grad(), extract_features(model, ["blocks.0.attn.attention"]) as extractor:
        attention = _run(extractor, images)["blocks.0.attn.attention"]
    assert attention.shape == (2, 3, 17, 17)
    assert torch.allclose(attention.sum(3), torch.ones(2, 3, 17))
    assert attn.fused_attn == fused


def test_channels_last_maps_become_maps():
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=12, depths=(1, 1), num_classes=3)
    assert feature_shapes(model, ["layers.0", "layers.0.patch_map"], (3, 32, 32)) == {
        "layers.0": (8, 8, 12),
        "layers.0.patch_map": (12, 8, 8),
    }


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("head.patch_map", r"'head.patch_map' needs tokens \[N, D\], not \[3\] per image"),
        ("blocks.0.norm1.attention", "LayerNorm is no attention of timm"),
        ("blocks.7.patch_map", "the model has no module 'blocks.7'"),
    ],
)
def test_layers_without_tokens_are_refused(part, sentence):
    with pytest.raises(ModelError, match=sentence):
        feature_shapes(timm_vit(), [part], (3, 16, 16))


def test_patches_in_no_square_are_refused():
    model = timm_vit(img_size=(16, 8))
    with pytest.raises(ModelError, match="9 tokens less 1 before the patches are no square"):
        feature_shapes(model, ["blocks.0.patch_map"], (3, 16, 8))


def test_pre_logits_are_the_input_of_the_classifier():
    model, images = timm_vit(), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), extract_features(model, ["pre_logits"]) as extractor:
        found, logits = extractor(images).features["pre_logits"], model(images)
    assert torch.equal(model.get_submodule("head")(found), logits)


@pytest.mark.parametrize("name", ["resnet8", "torchvision:resnet18", "timm:test_vit"])
def test_pre_logits_without_a_classifier_are_the_output(name):
    shape = {"in_channels": 3, "image_size": (32, 32), "seed": 0}
    whole, headless = (build_model(ModelConfig(name=name), num_classes=num, **shape).eval() for num in (5, 0))
    whole.load_state_dict(headless.state_dict(), strict=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for model in (whole, headless):
            with extract_features(model, ["pre_logits"]) as extractor:
                assert torch.equal(extractor(images).features["pre_logits"], headless(images))
    assert is_headless(headless)
    assert not is_headless(whole)


def test_pre_logits_need_a_network_that_ends_in_its_classifier():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.first(images.mean((2, 3))) + self.second(images.mean((2, 3)))

    with pytest.raises(ModelError, match="'second', but what that returns is not what the network returns"):
        feature_shapes(TwoHeads(), ["pre_logits"], (3, 4, 4))
