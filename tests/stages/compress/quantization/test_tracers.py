"""INT8 of networks that branch on shapes: transformers', timm's "same" padding, and a user's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.fx_trace import trace
from kdpipe.stages.compress.quantization.qat import QatModel, calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model

HF = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 32, "patch_size": 4}
NETWORKS = [
    ("hf:none", {"model_type": "vit", **HF}),
    ("hf:none", {"model_type": "clip", "vision_config": {**HF, "projection_dim": 6}}),
    ("hf:none", {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ("timm:tf_mobilenetv3_small_minimal_100", {}),
]


@pytest.mark.parametrize(("name", "args"), NETWORKS)
def test_networks_of_libraries_are_quantized_for_any_batch(name, args):
    pytest.importorskip("timm" if name.startswith("timm:") else "transformers")
    config = ModelConfig(name=name, args=args)
    model = build_model(config, num_classes=4, in_channels=3, image_size=(16, 16), seed=0).eval()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = prepare_qat(model, images[:2])
    calibrate(prepared, [images])
    with torch.no_grad():
        largest = model(images).abs().max()
        assert (prepared(images) - model(images)).abs().max() < 0.05 * largest
        torch.testing.assert_close(prepared.for_export()(images), prepared(images))


class OfEvenSize(nn.Module):
    """It pads odd images, counts its values, and casts them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(3, 1, 1))

    def forward(self, images):
        batch, _, height, _ = images.shape
        if height % 2:
            images = F.pad(images, (0, 1, 0, 1))
        low, high = (images + self.shift).to(self.conv.weight.dtype).chunk(2, dim=2)
        return self.fc(F.relu(self.conv(low + high)).float().mean((2, 3)).reshape(batch, -1))


def test_shapes_are_numbers_but_for_the_batch():
    model = OfEvenSize().eval()
    images = torch.rand(3, 3, 9, 9)
    traced = trace(OfEvenSize().eval(), images[:2], QatModel)
    traced.load_state_dict(model.state_dict())
    torch.testing.assert_close(traced(images), model(images))
    calibrate(prepared := prepare_qat(model, images[:2]), [images])
    assert prepared(images).shape == (3, 2)


class OfValues(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_branches_on_values_are_refused():
    with pytest.raises(
        ModelError, match=r"cannot trace its forward \(OfValues\).*without Python branches on tensor values"
    ):
        trace(OfValues(), torch.ones(2, 3, 4, 4), QatModel)
