"""A linear embedding of a layer's pooled output, which trains with the student and is not part of it."""

from __future__ import annotations

from torch import Tensor, nn

from stages.forms import POOLED, Shape, Wanted, form_shape, pooled


class Embedding(nn.Module):
    """Average pooling over positions, then a linear layer: [B, *shape] to [B, dim]."""

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(form_shape(Wanted("", POOLED), shape)[0], dim)

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.linear(pooled(features).to(self.linear.weight.dtype))
        return embedded
