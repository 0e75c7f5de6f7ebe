"""Batch norm in evaluation, folded into the convolution before it: one pass over the activations less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class FoldedBatchNorms(TorchFunctionMode):
    """Computes a network's convolutions with the batch norms that alone read them, while it is active.

    The network, its modules and its weights stay as they are; a batch norm's hooks see what it returns without this.
    It is for networks in evaluation whose weights do not change.
    """

    def __init__(self, run: Callable[[], Iterable[Tensor]]) -> None:
        """Find them in a pass; `run` returns the outputs that are used."""
        super().__init__()
        with _Finder() as finder, torch.no_grad():
            used = {id(output) for output in run()}
        self._weights: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._norms: dict[int, Tensor] = {}
        for key, (convolution, norm) in finder.pairs().items():
            if key not in used:
                weight, mean = convolution[0][1], norm[0][1]
                self._weights[id(weight)] = weight, *_folded(convolution, norm)
                self._norms[id(mean)] = mean

    @property
    def num_folded(self) -> int:
        return len(self._norms)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and id(args[1]) in self._norms:
            return args[0]
        if func is torch.conv2d and len(args) > 1 and id(args[1]) in self._weights:
            _, weight, bias = self._weights[id(args[1])]
            return func(args[0], weight, bias, *args[3:], **{key: kwargs[key] for key in kwargs if key != "bias"})
        return func(*args, **kwargs)


class _Finder(TorchFunctionMode):
    """Notes each convolution, and what reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, Tensor] = {}  # kept, so that no other tensor gets the id
        self._convolutions: dict[int, Arguments] = {}  # by the id of the output
        self._norms: dict[int, Arguments] = {}
        self._num_reads, self._num_uses = Counter[int](), Counter[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.__setitem__ or any(isinstance(one, Tensor) for one in tree_leaves(result)):  # no size query
            self._num_reads.update(id(one) for one in tree_leaves((args, kwargs)) if id(one) in self._outputs)
        if func is torch.conv2d and len(args) > 1:
            self._outputs[id(result)], self._convolutions[id(result)] = result, (args, kwargs)
            self._num_uses[id(args[1])] += 1
        elif func is F.batch_norm and args[1] is not None and not _named(args, kwargs).get("training"):
            self._norms[id(args[0])] = args, kwargs
            self._num_uses[id(args[1])] += 1
        return result

    def pairs(self) -> dict[int, tuple[Arguments, Arguments]]:
        """Return the convolutions, each used once, with the batch norm that alone reads them, by the output's id."""
        return {
            key: (self._convolutions[key], norm)
            for key, norm in self._norms.items()
            if self._num_reads[key] == 1
            and self._num_uses[id(norm[0][1])] == self._num_uses[id(self._convolutions[key][0][1])] == 1
        }


def _folded(convolution: Arguments, norm: Arguments) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with its batch norm."""
    (_, weight, *rest), given = convolution
    _, mean, variance = norm[0][:3]
    named = _named(*norm)
    bias = rest[0] if rest else given.get("bias")
    weight, bias = fuse_conv_bn_weights(
        weight, bias, mean, variance, named.get("eps", 1e-5), named.get("weight"), named.get("bias")
    )
    return weight.detach(), bias.detach()


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch norm's arguments besides its input and statistics by name."""
    return dict(zip(("weight", "bias", "training", "momentum", "eps"), args[3:], strict=False)) | dict(kwargs)
