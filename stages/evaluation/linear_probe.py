"""The linear probe: multinomial logistic regression on frozen embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.numerics import derive_seed

L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""The penalties that are tried, the strongest first: half the squared norm of the weights counts so many times."""

HELD_OUT = 0.2
"""The share of the images, drawn from a fixed seed, on which the penalty is chosen."""

MIN_TO_CHOOSE = 50
"""With fewer images the penalty is DEFAULT_L2."""

DEFAULT_L2 = 0.01

MAX_ITERATIONS = 100


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of embeddings: weight float32 [C, D], bias float32 [C]; `l2` is its penalty."""

    weight: Tensor
    bias: Tensor
    l2: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return logits [B, C] of embeddings [B, D]."""
        return F.linear(embeddings.float(), self.weight, self.bias)


def fit_probe(vectors: Tensor, labels: Tensor, num_classes: int) -> LinearProbe:
    """Fit a linear classifier to embeddings float32 [N, D] with labels int64 [N], in float64 by L-BFGS.

    The penalty is that of `L2` with the lowest cross entropy on the images held out; the classifier is then fitted to
    all images.

    Example:
        >>> probe = fit_probe(torch.tensor([[1.0], [2.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> probe(torch.tensor([[0.0], [7.0]])).argmax(1)
        tensor([0, 1])
    """
    labels = labels.to(vectors.device)
    mean = vectors.double().mean(0)
    scale = (vectors.double() - mean).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    inputs = (vectors.double() - mean) / scale
    l2 = _chosen_l2(inputs, labels, num_classes) if len(labels) >= MIN_TO_CHOOSE else DEFAULT_L2
    weight, bias = _fit(inputs, labels, l2, _zeros(inputs, num_classes))
    weight = weight / scale
    return LinearProbe(weight.float(), (bias - weight @ mean).float(), l2)


def _chosen_l2(inputs: Tensor, labels: Tensor, num_classes: int) -> float:
    generator = torch.Generator().manual_seed(derive_seed(0, "linear probe"))
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    num_held = round(HELD_OUT * len(labels))
    held, kept = order[:num_held], order[num_held:]
    parameters, losses = _zeros(inputs, num_classes), []
    for l2 in L2:  # each starts where the stronger penalty ended
        parameters = _fit(inputs[kept], labels[kept], l2, parameters)
        losses.append(float(F.cross_entropy(F.linear(inputs[held], *parameters), labels[held])))
    return L2[losses.index(min(losses))]


def _zeros(inputs: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return inputs.new_zeros(num_classes, inputs.shape[1]), inputs.new_zeros(num_classes)


@torch.enable_grad()
def _fit(inputs: Tensor, labels: Tensor, l2: float, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    weight, bias = (one.clone().requires_grad_() for one in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
