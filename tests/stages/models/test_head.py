"""The head of a network is its last linear layer, if what that returns is what the network returns."""

import pytest
import torch
from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.models.hooks import extract_features

IMAGE_SHAPE = (3, 8, 8)


class Classifier(nn.Module):
    """A linear layer on pixels, and what the test makes of it."""

    def __init__(self, *, bias=True, scale=1.0):
        super().__init__()
        self.dropout, self.fc, self.scale = nn.Dropout(0.5), nn.Linear(192, 5, bias=bias), scale

    def forward(self, images):
        return self.scale * self.fc(self.dropout(images.flatten(1)))


class TwoHeads(Classifier):
    """The mean of two linear layers, as of DeiT's distilled networks."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(192, 5)

    def forward(self, images):
        return (super().forward(images) + self.other(images.flatten(1))) / 2


class Doubled(nn.Linear):
    def forward(self, features):
        return 2 * super().forward(features)


@pytest.mark.parametrize("bias", [True, False])
def test_head_gives_the_logits_of_what_goes_into_it(bias):
    model, images = Classifier(bias=bias), torch.randn(4, *IMAGE_SHAPE)
    head = torch.from_numpy(linear_head(model, IMAGE_SHAPE))
    with torch.no_grad(), extract_features(model.eval(), ["pre_logits"]) as extractor:
        outputs = extractor(images)
    torch.testing.assert_close(outputs.features["pre_logits"] @ head[:, :-1].T + head[:, -1], outputs.logits)
    assert head.shape == (5, 193) and bool(head[:, -1].any()) is bias


def test_models_in_training_mode_are_left_so():
    model = Classifier().train()
    linear_head(model, IMAGE_SHAPE)
    assert model.training


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoHeads(), "'other', but what that returns is not what the network returns"),
        (Classifier(scale=2.0), "'fc', but what that returns is not what the network returns"),
        (nn.Sequential(nn.Flatten(), Doubled(192, 5)), "its last layer, 1, is Doubled, not Linear"),
        (nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), "its last layer, 0, is Conv2d, not Linear"),
    ],
    ids=["two heads", "scaled", "own forward", "convolution"],
)
def test_other_heads_are_refused_with_the_reason(model, reason):
    with pytest.raises(ModelError, match=f"the teacher's head cannot be stored: .*{reason}"):
        linear_head(model, IMAGE_SHAPE)
