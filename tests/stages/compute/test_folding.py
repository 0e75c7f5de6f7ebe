"""Batch norms in evaluation are folded into the convolutions that they alone read, without a change of the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdpipe.stages.compute import folding
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


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "layers", "number"),
    [
        (nn.ReLU(), ["1.2"], 2),
        (nn.ReLU(inplace=True), [], 2),
        (nn.ReLU6(inplace=True), ["1.2", "0"], 2),
        (nn.Hardtanh(-1.0, 0.5), ["0.1"], 1),  # the norm's own output is a feature
        (nn.ReLU(inplace=True), ["0.1"], 1),
        (nn.SiLU(), [], 0),
    ],
)
def test_activations_are_fused_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, activation: nn.Module, layers: list[str], number: int, precision: torch.dtype
) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1), nn.BatchNorm2d(4), activation) for stride in (1, 2)]
    model, images = nn.Sequential(*blocks).eval(), torch.randn(4, 4, 9, 9).to(memory_format=torch.channels_last)
    with (
        torch.no_grad(),
        torch.autocast("cpu", precision, enabled=precision != torch.float32, cache_enabled=False),
        extract_features(model, layers) as extractor,
        extractor.folded(images) as folded,
    ):
        fused = extractor(images).tensors
        monkeypatch.setattr(folding, "FUSED_TYPES", ())
        separate = extractor(images).tensors
    assert (folded.num_folded, folded.num_fused) == (2, number)
    assert all(torch.equal(one, other) for one, other in zip(fused, separate, strict=True))
