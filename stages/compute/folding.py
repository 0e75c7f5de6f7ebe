"""Batch norm in evaluation, folded into the convolution before it, on a CPU with the ReLU after it.

Each is one pass over the activations less. The kernel of the convolution (oneDNN) computes the ReLU too, which
gives the same bits: they commute with rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

Bounds = tuple[float, float | None]
"""What an activation cuts its input to: its lower bound, and the upper one if it has one."""

FUSED_TYPES = (torch.float32, torch.bfloat16)


class FoldedBatchNorms(TorchFunctionMode):
    """Computes a network's convolutions with the batch norms that alone read them, while it is active.

    Where an activation alone reads the norm, it is computed with them, too. The network, its modules and its weights
    stay as they are; hooks of a batch norm or activation see what it returns without this. It is for networks in
    evaluation whose weights do not change.
    """

    def __init__(self, run: Callable[[], Iterable[Tensor]]) -> None:
        """Find them in a pass; `run` returns the outputs that are used."""
        super().__init__()
        with _Finder() as finder, torch.no_grad():
            used = {id(output) for output in run()}
        self._weights: dict[int, _Convolution] = {}
        self._norms: dict[int, Tensor] = {}
        self._activated: dict[int, Tensor] = {}  # outputs of convolutions whose activation was computed with them
        for key, (convolution, norm) in finder.pairs().items():
            if key not in used:
                weight, mean = convolution[0][1], norm[0][1]
                bounds = finder.activation(key, used)
                self._weights[id(weight)] = _Convolution(weight, *_folded(convolution, norm), bounds)
                self._norms[id(mean)] = mean

    @property
    def num_folded(self) -> int:
        return len(self._norms)

    @property
    def num_fused(self) -> int:
        """The number of activations that a convolution's own kernel may compute."""
        return sum(one.bounds is not None for one in self._weights.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and id(args[1]) in self._norms:
            return args[0]
        if func is torch.conv2d and len(args) > 1 and id(args[1]) in self._weights:
            convolution = self._weights[id(args[1])]
            if (activated := convolution.activated(args[0], args[3:])) is not None:
                self._activated[id(activated)] = activated
                return activated
            named = {key: kwargs[key] for key in kwargs if key != "bias"}
            return func(args[0], convolution.folded, convolution.bias, *args[3:], **named)
        if self._activated and func in ACTIVATIONS and self._activated.pop(id(args[0]), None) is not None:
            return args[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Convolution:
    """A convolution's own weight, that with its batch norm and the bias, and the bounds of its activation, if any."""

    weight: Tensor
    folded: Tensor
    bias: Tensor
    bounds: Bounds | None

    def activated(self, images: Tensor, geometry: Sequence[Any]) -> Tensor | None:
        """Compute convolution and activation in one kernel; None where there is none for them."""
        is_mixed = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_mixed else images.dtype
        if (
            self.bounds is None
            or images.device.type != "cpu"
            or dtype not in FUSED_TYPES
            or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            or len(geometry) != 4
            or isinstance(geometry[1], str)
        ):
            return None
        stride, padding, dilation, groups = geometry
        lower, upper = self.bounds
        name, bounds = ("relu", []) if upper is None else ("hardtanh", [lower, upper])
        values = [one.to(dtype) for one in (images, self.folded, self.bias)]
        kernel = torch.ops.mkldnn._convolution_pointwise
        sizes = [_pair(padding), _pair(stride), _pair(dilation)]
        return kernel(*values, *sizes, groups, name, bounds, "")  # type: ignore[no-any-return]


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


class _Finder(TorchFunctionMode):
    """Notes each convolution, and what reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, Tensor] = {}  # kept, so that no other tensor gets the id
        self._kept: list[Tensor] = []
        self._convolutions: dict[int, Arguments] = {}  # by the id of the output
        self._norms: dict[int, Arguments] = {}
        self._activations: dict[int, tuple[int, Bounds]] = {}  # by the id of the norm's output, with that of its own
        self._norm_outputs: dict[int, Tensor] = {}  # by the id of the convolution's output
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
            self._norm_outputs[id(args[0])] = self._outputs[id(result)] = result
            self._num_uses[id(args[1])] += 1
        elif func in ACTIVATIONS and self._num_reads[id(args[0])] == 1:
            self._activations[id(args[0])] = id(result), ACTIVATIONS[func](args, kwargs)
            if result is args[0]:  # in place: what reads it later, reads the activation
                del self._outputs[id(result)]
                self._kept.append(result)
        return result

    def activation(self, key: int, used: Container[int]) -> Bounds | None:
        """Return the bounds of the activation that alone reads the norm of a convolution, by that one's output's id."""
        norm = id(self._norm_outputs[key])
        if norm not in self._activations or self._num_reads[norm] != 1:
            return None
        own, bounds = self._activations[norm]
        return None if norm in used and own != norm else bounds

    def pairs(self) -> dict[int, tuple[Arguments, Arguments]]:
        """Return the convolutions, each used once, with the batch norm that alone reads them, by the output's id."""
        return {
            key: (self._convolutions[key], norm)
            for key, norm in self._norms.items()
            if self._num_reads[key] == 1
            and self._num_uses[id(norm[0][1])] == self._num_uses[id(self._convolutions[key][0][1])] == 1
        }


def _relu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bounds:
    return 0.0, None


def _relu6(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bounds:
    return 0.0, 6.0


def _hardtanh(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bounds:
    named = dict(zip(("min_val", "max_val"), args[1:], strict=False)) | dict(kwargs)
    return named.get("min_val", -1.0), named.get("max_val", 1.0)


ACTIVATIONS: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Bounds]] = {
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
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
