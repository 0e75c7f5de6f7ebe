"""The weights that are evaluated and exported, where they are not those that are trained.

They are an exponential moving average (EMA) of the network's weights, or those to which an optimizer with `train()` and
`eval()`, as schedule-free ones, switches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


class WeightAverage:
    """The exponential moving average of a network's weights and of the running statistics of its batch norms.

    After step t, from 0: average += (1 - d) (weights - average) with d = min(decay, (1 + t) / (10 + t)), so that the
    initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.tensors = {name: tensor.detach().clone() for name, tensor in averaged_tensors(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(averaged_tensors(self.model).values()), 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the network's weights by their average."""
        torch._foreach_copy_(list(averaged_tensors(self.model).values()), list(self.tensors.values()))

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load an average that was saved; raises ValueError if it belongs to another network."""
        found, wanted = ({name: one.shape for name, one in some.items()} for some in (tensors, self.tensors))
        if found != wanted:
            raise ValueError("its average of weights belongs to another network")
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are averaged. Other buffers, such as observed ranges, are those of the last step."""
    found: dict[str, Tensor] = {name: one.data for name, one in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            found |= {f"{path}.running_mean": module.running_mean, f"{path}.running_var": module.running_var}
    return found


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether an optimizer trains other weights than it evaluates, between which it switches."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def use_evaluated_weights(optimizer: Optimizer, average: WeightAverage | None) -> None:
    """Give the network the weights that are evaluated and exported, in place of those that are trained."""
    if has_modes(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]
    if average is not None:
        average.copy_to_model()


@contextmanager
def evaluated_weights(optimizer: Optimizer, average: WeightAverage | None) -> Iterator[None]:
    """Give the network the weights that are evaluated within the block; afterwards all bits are as before."""
    if average is None and not has_modes(optimizer):
        yield
        return
    trained = [one.data for group in optimizer.param_groups for one in group["params"]]
    trained += [] if average is None else list(averaged_tensors(average.model).values())
    before = [tensor.clone() for tensor in trained]
    use_evaluated_weights(optimizer, average)
    try:
        yield
    finally:
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        torch._foreach_copy_(trained, before)
