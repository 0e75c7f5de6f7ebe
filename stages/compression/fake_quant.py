"""INT8 in float clothes: modules that round to the values that INT8 can hold, and let the gradient through.

Activations are unsigned 8-bit with one scale and zero point a tensor; weights are signed 8-bit, symmetric, with one
scale an output channel: what onnxruntime's CPU kernels run fast (the method: Jacob et al. 2018, arXiv:1712.05877). All
of it computes in float32, inside an autocast region too: a grid of 256 values does not survive bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import ModelError

ACTIVATION_MAX = 255
WEIGHT_MAX = 127
# A dead channel has no weights to scale by, and a scale near zero overflows the int32 bias of the integer kernel.
SCALE_FLOOR = 2.0**-20
# The share that a new batch has in the observed range, once there have been as many batches as its inverse.
MOMENTUM = 0.01


class ActivationQuantizer(nn.Module):
    """Rounds a tensor of any shape to 256 values between the lowest and the highest one that it has come to expect.

    In training mode the expected range follows the batches: their plain mean at first, a moving average later, and
    always including zero. `freeze` ends that. All that it knows stands in its buffers: `low`, `high`, `num_batches`,
    `frozen`. Before the first batch the range is NaN, and so is the output: never a plausible number out of nothing.
    Gradients pass straight through where the input lies within the range, and are zero where it was clipped.
    """

    low: Tensor
    high: Tensor
    num_batches: Tensor
    frozen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rounding = True  # off while calibrating; a mode, not a state
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("frozen", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            self._observe(x.detach())
        if not self.rounding:
            return x
        scale, zero_point = self.scale_and_zero_point()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, ACTIVATION_MAX)

    def _observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`; decided on the device, so that no step waits for the GPU."""
        lowest, highest = torch.aminmax(x)
        share = torch.clamp(1 / (self.num_batches + 1), min=MOMENTUM)
        for bound, seen in ((self.low, lowest.clamp(max=0)), (self.high, highest.clamp(min=0))):
            moved = torch.where(self.num_batches == 0, seen, bound + share * (seen - bound))
            bound.copy_(torch.where(self.frozen, bound, moved))
        self.num_batches += ~self.frozen

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """The step between two values (float32, []) and the integer that stands for zero (int32, [], 0 to 255)."""
        scale = torch.clamp((self.high - self.low) / ACTIVATION_MAX, min=SCALE_FLOOR)
        zero_point = torch.round(-self.low / scale).nan_to_num().clamp(0, ACTIVATION_MAX)
        return scale, zero_point.to(torch.int32)

    def freeze(self) -> None:
        """Keep the range as it is from now on, in training too."""
        self.frozen.fill_(True)


def weight_scale(weight: Tensor) -> Tensor:
    """The step of each output channel of a weight [O, ...]: its largest magnitude over 127, at least 2^-20; [O]."""
    return torch.clamp(weight.detach().flatten(1).abs().amax(dim=1) / WEIGHT_MAX, min=SCALE_FLOOR)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [O, ...] rounded to whole multiples, -127 to 127, of its channels' scales [O]."""
    zero_points = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
    rounded: Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -WEIGHT_MAX, WEIGHT_MAX)
    return rounded


class QuantConv2d(nn.Conv2d):
    """A convolution whose weight is rounded to INT8 on every call; the bias stays float (int32 is as good as that)."""

    rounding = True

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            weight = round_weight(self.weight, weight_scale(self.weight)) if self.rounding else self.weight
            output: Tensor = self._conv_forward(input.float(), weight, self.bias)
            return output


class QuantLinear(nn.Linear):
    """A linear layer whose weight is rounded to INT8 on every call; the bias stays float."""

    rounding = True

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            weight = round_weight(self.weight, weight_scale(self.weight)) if self.rounding else self.weight
            output: Tensor = F.linear(input.float(), weight, self.bias)
            return output


def set_rounding(model: nn.Module, on: bool) -> None:
    """Let every quantized module round, or pass its values through as float."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | QuantConv2d | QuantLinear):
            module.rounding = on


def quantizers_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a prepared model by path. ModelError if it has none: it was not prepared."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, ActivationQuantizer)}
    if not found:
        raise ModelError("the model has no activation quantizers: prepare it with prepare_qat first.")
    return found


def require_observed(quantizers: dict[str, ActivationQuantizer]) -> None:
    """ModelError, naming the first one, if a quantizer has seen no batch and so knows no range."""
    for path, quantizer in quantizers.items():
        if not int(quantizer.num_batches):
            raise ModelError(f"the activation range {path!r} has seen no batch yet: calibrate the model first.")
