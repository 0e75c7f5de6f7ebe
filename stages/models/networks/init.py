"""Initial weights of small-image networks (He et al. 2015, "Delving Deep into Rectifiers")."""

from __future__ import annotations

from torch import nn


def he_initialize(model: nn.Module, *, linear_std: float | None = None) -> None:
    """Draw every convolution from N(0, 2 / fan_out) with zero bias; with `linear_std`, linears from N(0, linear_std²).

    Batch norms keep torch's default (weight 1, bias 0), and so do linears without `linear_std`.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
