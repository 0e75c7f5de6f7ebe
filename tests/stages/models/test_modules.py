"""Tests of the list of a network's modules."""

import torch
from torch import nn

from kdpipe.stages.models.modules import list_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(1, 3, 3), nn.Linear(2, 2)
        self.lstm, self.head = nn.LSTM(12, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(self.conv(images).flatten(1)[:, None])
        return self.head(outputs[:, 0])


def test_modules_that_give_tensors_are_listed() -> None:
    model = Net().train()
    assert [(one.path, one.kind, one.shape) for one in list_modules(model, (1, 4, 4))] == [
        ("conv", "Conv2d", (3, 2, 2)),
        ("head", "Linear", (4,)),
    ]
    assert model.training
