"""Tests of the cross-entropy of labels, of which some are unknown."""

import torch
import torch.nn.functional as F

from kdpipe.stages.data.loader.labels import HardLabels

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def test_unlabeled_samples_add_nothing():
    found = HardLabels(torch.tensor([0, -1, 2, -1])).losses(LOGITS, 0.1, WEIGHTS)
    own = F.cross_entropy(LOGITS[::2], torch.tensor([0, 2]), label_smoothing=0.1, reduction="none")
    assert torch.equal(found[::2], own * WEIGHTS[[0, 2]])
    assert found[1::2].tolist() == [0, 0]


def test_of_a_mixture_the_labeled_part_counts():
    hard = HardLabels(torch.tensor([0, -1, 2, -1]), torch.tensor([-1, 1, 1, -1]), torch.full((4,), 0.75))
    own = -LOGITS.log_softmax(1)
    wanted = torch.stack([0.75 * own[0, 0], 0.25 * own[1, 1], 0.75 * own[2, 2] + 0.25 * own[2, 1], torch.tensor(0.0)])
    assert torch.allclose(hard.losses(LOGITS), wanted)
