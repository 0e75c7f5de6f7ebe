"""Gradients by pixels are computed in float32, whatever the precision of the store."""

import torch
from torch import nn

from kdpipe.stages.cache_teacher.inference import forward
from kdpipe.stages.compute.settings import EXACT, ComputeSettings
from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.targets.feature_spec import INPUT_GRADIENT


def test_gradients_by_pixels_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)

    def outputs(settings, hard):
        teacher = ModelBundle(model, {}, Normalization((0.5,), (0.25,)), settings)
        with extract_features(model, []) as extractor:
            return forward(extractor, teacher, images, hard)

    labels = HardLabels(torch.tensor([0, 1, 2, 0, 1]))
    exact, stored = (outputs(one, labels) for one in (EXACT, ComputeSettings("bfloat16")))
    assert torch.equal(exact.features[INPUT_GRADIENT], stored.features[INPUT_GRADIENT])
    assert not torch.equal(outputs(ComputeSettings("bfloat16"), None).logits, exact.logits)
