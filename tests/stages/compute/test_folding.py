"""Batch norms in evaluation are folded into the convolutions that they alone read, without a change of the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdpipe.stages.models.hooks import extract_features


class Net(nn.Module):
    """Two convolutions with batch norms; `read_again` adds the first convolution's output to its norm's."""

    def __init__(self, *, read_again: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.other = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False)
        self.read_again, self.shared = read_again, shared
        for module in (self.norm, self.other):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv(images)
        x: Tensor = self.norm(first)
        x = torch.relu_(x + first if self.read_again else x)
        x = self.other(self.deep(x))
        x = self.other(self.deep(x)) if self.shared else x
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("keys", "layers", "number"),
    [
        ({}, ["norm", "other"], 2),
        ({}, ["conv"], 1),  # its own output is a feature
        ({"read_again": True}, [], 1),
        ({"shared": True}, [], 1),
    ],
)
def test_folded_computes_the_same(keys: dict[str, bool], layers: list[str], number: int) -> None:
    torch.manual_seed(0)
    model, images = Net(**keys).eval(), torch.rand(4, 3, 9, 9)
    calls: list[object] = []
    with torch.no_grad(), extract_features(model, layers) as extractor:
        expected = extractor(images)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        folded = extractor.folded(images)
        handle = model.norm.register_forward_hook(lambda *given: calls.append(given))
        with folded:
            found = extractor(images)
        handle.remove()
    assert folded.num_folded == number and len(calls) == 1
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norms_in_training_are_not_folded() -> None:
    model = Net().eval()
    model.norm.train()
    with torch.no_grad(), extract_features(model, []) as extractor:
        assert extractor.folded(torch.rand(2, 3, 9, 9)).num_folded == 1
