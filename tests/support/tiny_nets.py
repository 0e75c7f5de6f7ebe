"""Networks of a few thousand parameters for pruning and INT8 tests, and their images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 5
EXAMPLE = torch.zeros(1, *IMAGE_SHAPE)


class ResidualBlock(nn.Module):
    """A block of conv-BN-ReLU-conv-BN, added in place to the input, then ReLU; one ReLU module is called twice."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 16, 1))
        self.layer2 = nn.Sequential(ResidualBlock(16, 24, 2))
        self.fc = nn.Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3)))


class Depthwise(nn.Module):
    """A network with an inverted residual with ReLU6, and an adaptive pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.classifier(self.pool(x))


class Preactivation(nn.Module):
    """A network with BN and ReLU before the convolutions, like wide resnets: no convolution can absorb the BN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        x = F.avg_pool2d(F.relu(self.bn3(x)), 8)
        return self.fc(x.view(x.size(0), -1))


class Branching(nn.Module):
    """A network whose map is pooled, split, shuffled and joined, as in shufflenets and densenets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.left, self.right = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1)
        self.fc = nn.Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, F.relu(self.left(changed)), F.relu(self.right(x))], dim=1)
        x = x.view(x.size(0), 3, 8, 4, 4).transpose(1, 2).reshape(x.size(0), 24, 4, 4)
        return self.fc(x.mean(dim=(2, 3)))


def plain() -> nn.Module:
    """Build convolutions without batch norm, max pools, and a linear layer that reads the flattened map."""
    return nn.Sequential(
        OrderedDict(
            stage1=nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            stage2=nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            flatten=nn.Flatten(),
            hidden=nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Dropout(0.5)),
            fc=nn.Linear(32, NUM_CLASSES),
        )
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "depthwise": Depthwise,
    "preactivation": Preactivation,
    "plain": plain,
}

UNPRUNABLE: dict[str, Callable[[], nn.Module]] = {"branching": Branching}

CONTAINERS = {
    "residual": ["layer1", "layer1.0", "layer2", "stem", "layer2.0.shortcut"],
    "depthwise": ["stem", "expand", "project", "classifier"],
    "preactivation": [],
    "plain": ["stage1", "stage2", "hidden"],
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a freshly initialized network with running statistics and scales moved off their initial values."""
    torch.manual_seed(seed)
    model = (NETS | UNPRUNABLE)[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy copies of one pattern per class, [N, 3, 8, 8], and their classes [N]."""
    generator = torch.Generator().manual_seed(99)
    patterns = torch.randn(NUM_CLASSES, *IMAGE_SHAPE, generator=generator)
    generator.manual_seed(seed)
    labels = torch.arange(num_samples) % NUM_CLASSES
    return patterns[labels] + 0.7 * torch.randn(num_samples, *IMAGE_SHAPE, generator=generator), labels


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Run one training step on a batch of `images`."""
    torch.manual_seed(seed)  # dropout
    model.train()
    batch, labels = images(20, seed)
    optimizer.zero_grad()
    F.cross_entropy(model(batch), labels).backward()
    optimizer.step()


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
