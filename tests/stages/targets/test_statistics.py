"""Tests of pooling in a fixed order of sums."""

import pytest
import torch
import torch.nn.functional as F

from kdpipe.stages.targets.statistics import ordered_average_pool


@pytest.mark.parametrize("size", [(4, 4), (2, 7), (1, 3), (5, 3)])
def test_ordered_pooling_equals_adaptive_pooling(size):
    maps = torch.randn(2, 3, 8, 14, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 3, *size, dtype=torch.float64)
    found = [pool(maps, size) for pool in (F.adaptive_avg_pool2d, ordered_average_pool)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(one, maps, gradient)[0] for one in found))
