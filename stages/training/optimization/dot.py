"""The optimizer of DOT: SGD with a momentum for the labels' gradient and a larger one for that of distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from kdpipe.stages.runtime.distributed import gradient_group

TASK, DISTILLATION = "momentum_buffer", "distillation_momentum_buffer"


class DOT(Optimizer):
    """SGD with momentum - delta for the labels' loss and momentum + delta for the distillation losses.

    Zhao et al. 2023, "DOT: A Distillation-Oriented Trainer" (ICCV, arXiv 2307.08436; reference code mdistiller):

        v_task = (momentum - delta) v_task + g_task + weight_decay w
        v_kd   = (momentum + delta) v_kd + g_kd
        w      = w - lr (v_task + v_kd)

    The gradient is that of the sum of all losses; `hold` computes the labels' share of it by a second backward pass.
    Weights that only one of both reaches, and steps without `hold`, such as those of a teacher or a student without
    distillation, have plain momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        delta: float = 0.075,
    ) -> None:
        if not 0 <= delta <= momentum or momentum + delta >= 1:
            raise ValueError(f"delta must be from 0 to momentum = {momentum:g} and below {1 - momentum:g}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "delta": delta})
        self._held: dict[Tensor, Tensor] = {}
        self._distilled: set[Tensor] | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and those that are held."""
        self._held = {}
        super().zero_grad(set_to_none)

    def hold(self, task_loss: Tensor, distillation_loss: Tensor, scale: Tensor) -> None:
        """Add the gradient of the labels' loss, both of which are scaled by `scale`; the graph is kept."""
        parameters = self._parameters()
        if self._distilled is None:  # which weights the losses reach stays the same
            found = torch.autograd.grad(distillation_loss, parameters, retain_graph=True, allow_unused=True)
            self._distilled = {one for one, gradient in zip(parameters, found, strict=True) if gradient is not None}
        gradients = torch.autograd.grad(task_loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter in self._distilled:
                held, own = self._held.get(parameter), gradient / scale
                self._held[parameter] = own if held is None else held + own

    def average(self, num_processes: int) -> None:
        """Put averages over the processes in place of the held gradients."""
        if self._held:
            parts = [one for one in self._parameters() if one in self._held]
            flat = torch.cat([self._held[one].reshape(-1) for one in parts])
            dist.all_reduce(flat, group=gradient_group())
            pieces = torch.split(flat / num_processes, [one.numel() for one in parts])
            self._held = {one: piece.view_as(one) for one, piece in zip(parts, pieces, strict=True)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients, of which the held ones are the labels'."""
        for group in self.param_groups:
            momentum, delta = group["momentum"], group["delta"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                held = self._held.get(weight)
                first = weight.grad if held is None else held
                if group["weight_decay"]:
                    first = first.add(weight, alpha=group["weight_decay"])
                move = self._velocity(weight, TASK, first, momentum if held is None else momentum - delta)
                if held is not None:
                    move = move + self._velocity(weight, DISTILLATION, weight.grad - held, momentum + delta)
                weight.add_(move, alpha=-group["lr"])

    def _velocity(self, weight: Tensor, name: str, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if name not in state:
            state[name] = torch.zeros_like(weight)
        velocity: Tensor = state[name]
        return velocity.mul_(momentum).add_(gradient)

    def _parameters(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"] if one.requires_grad]
