"""Importance of channels: the score by which pruning decides which ones to remove."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError

Importance = Literal["l1", "l2", "taylor", "bn_scale"]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def import_torch_pruning() -> Any:
    """Return torch-pruning; timm, which takes a second and which it uses only to count operations, is not imported."""
    hidden = "timm" not in sys.modules
    if hidden:
        sys.modules["timm"] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        import torch_pruning
    finally:
        if hidden:
            del sys.modules["timm"]
    return torch_pruning


def measure_of(kind: Importance) -> Callable[[Any], Tensor]:
    """Return the function that computes the importance [num_channels] of a torch-pruning group.

    All are >= 0, and only their order within a group and their ratios count. A layer's weights that write a channel
    (its filter) and those that read it are one entry each, a batch norm's scale is one, and the mean over a group's
    entries is its importance (DepGraph, Fang et al. 2023, arXiv:2301.12900, section 3.2, without learned sparsity).
    Depthwise weights, biases and running statistics are no entries.

    "l1": an entry is the sum of |w|; batch norms' scales count.
    "l2": an entry is the sum of w^2, and the root of the mean is taken, the group's L2 norm up to a factor.
    "taylor": an entry is the sum of |w * dL/dw| over the weights of convolutions, linear layers and layer norms
        (first order, after Molchanov et al. 2019, arXiv:1906.10771, whose squares are magnitudes here); the gradients
        are in `.grad` (`attach_gradients`).
    "bn_scale": an entry is |gamma| of a batch norm, and nothing else counts (network slimming, Liu et al. 2017,
        arXiv:1708.06519). The group must have one (`batch_norms_of`).
    """
    torch_pruning = import_torch_pruning()
    measure: Any
    if kind == "taylor":
        measure = torch_pruning.importance.GroupTaylorImportance(normalizer=None)
    elif kind == "bn_scale":
        measure = torch_pruning.importance.BNScaleImportance(normalizer=None)
    else:
        measure = torch_pruning.importance.GroupMagnitudeImportance(p=1 if kind == "l1" else 2, normalizer=None)

    def scores(group: Any) -> Tensor:
        found: Tensor = measure(group).detach().cpu().double()
        if kind == "bn_scale":  # as long as the first batch norm; behind a flattened map that one covers pixels
            found = found[: len(group[0].idxs)]
        return found.sqrt() if kind == "l2" else found

    return scores


def attach_gradients(model: nn.Module, gradients: Mapping[str, Tensor] | None) -> None:
    """Set `.grad`, which "taylor" reads, by parameter name; a parameter without one (frozen) gets zeros.

    Raises:
        ModelError: If there are none at all, or one has another shape than its parameter.
    """
    if not gradients:
        raise ModelError('prune.importance = "taylor" needs the gradients of the loss, which prune() did not get.')
    for path, parameter in model.named_parameters():
        gradient = gradients.get(path)
        if gradient is not None and gradient.shape != parameter.shape:
            raise ModelError(
                f"the gradient of {path!r} has the shape {list(gradient.shape)}, its parameter "
                f"{list(parameter.shape)}: gradients must come from the network being pruned."
            )
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.detach().to(parameter)


def detach_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def batch_norms_of(members: Sequence[Any]) -> list[nn.Module]:
    """Return the affine batch norms among the members of a group."""
    return [member for member in members if isinstance(member, BATCH_NORMS) and member.affine]


def global_lowest(scores: Sequence[Tensor], num_safe: Sequence[int], num_removed: int) -> list[int] | None:
    """Count how many of each of `scores` [N_i] are among the `num_removed` lowest of all.

    The `num_safe` largest of each are protected. Of equal scores the first ones go. Returns None if so many cannot go.
    """
    if not scores:
        return None if num_removed > 0 else []
    candidates = [score.clone() for score in scores]
    for score, num_protected in zip(candidates, num_safe, strict=True):
        score[score.argsort(descending=True, stable=True)[:num_protected]] = torch.inf
    ranked = torch.cat(candidates)
    if num_removed > int(ranked.isfinite().sum()):
        return None
    removed = torch.zeros(len(ranked), dtype=torch.bool)
    removed[ranked.argsort(stable=True)[:num_removed]] = True
    return [int(part.sum()) for part in torch.split(removed, [len(score) for score in scores])]
