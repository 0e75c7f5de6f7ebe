"""The cosine distance of embeddings: its values, and its default layers."""

import math

import torch

from kdpipe.stages.losses.features.cosine import Cosine, cosine_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec


def test_cosine_is_one_minus_the_cosine_whatever_the_lengths():
    student = torch.tensor([[2.0, 0.0], [0.0, -3.0], [1.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[5.0, 0.0], [0.0, 0.1], [0.0, 7.0]])
    wanted = torch.tensor([0.0, 2.0, 1 - math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(cosine_loss(student, teacher), wanted)


def test_by_default_the_inputs_of_the_classifiers_are_compared():
    loss, pooled = Cosine(), FeatureSpec("pre_logits", "pooled")
    assert loss.student_layers() == ("pre_logits",)
    assert loss.required_features({"pre_logits": (4,)}) == (pooled,)
    [pair] = loss.build({"pre_logits": (4, 2, 2)}, {pooled: (7,)}, None).pairs
    assert pair(torch.randn(3, 4, 2, 2), torch.randn(3, 7)).shape == (3,)
