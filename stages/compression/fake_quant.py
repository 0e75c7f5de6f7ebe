"""INT8 in float clothes: modules that round to the values that INT8 can hold, and let the gradient through.

Activations are unsigned 8-bit with one scale and zero point a tensor; weights are signed 8-bit, symmetric, with one
scale an output channel; biases are signed 32-bit, in steps of input scale times weight scale: what onnxruntime's CPU
kernels run fast (the method: Jacob et al. 2018, arXiv:1712.05877). All of it computes in float32, inside an autocast
region too: a grid of 256 values does not survive bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import ModelError

ACTIVATION_MAX = 255
WEIGHT_MAX = 127
# Half of what an int32 holds: the bias and the sum of the products must fit in together.
BIAS_MAX = 2**30
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
        scale = self.scale()
        zero_point = torch.round(-self.low / scale).nan_to_num().clamp(0, ACTIVATION_MAX)
        return scale, zero_point.to(torch.int32)

    def scale(self) -> Tensor:
        """The step between two values, float32, []; NaN before the first batch."""
        return torch.clamp((self.high - self.low) / ACTIVATION_MAX, min=SCALE_FLOOR)

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


def weight_and_bias_steps(
    weight: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The steps in which the INT8 file counts a weight [O, ...] and a bias [O]; both float32, [O].

    A bias counts in steps of input scale ([]) times weight scale. A channel with weights so small beside its bias that
    the bias would overflow gets a larger weight scale: such weights move its output by less than half a step anyway.
    Without an input scale, or a bias, the latter's step is None.
    """
    scale = weight_scale(weight)
    if bias is None or input_scale is None:
        return scale, None
    scale = torch.maximum(scale, bias.detach().abs() / (input_scale * BIAS_MAX))
    return scale, scale * input_scale


def whole_bias(bias: Tensor, step: Tensor) -> Tensor:
    """A bias [O] in whole steps [O], float64: float32 does not hold all of an int32's values."""
    return torch.round(bias.detach().double() / step)


class QuantConv2d(nn.Conv2d):
    """A convolution whose weight and bias are rounded on every call to what the INT8 file holds."""

    rounding = True
    input_grid: tuple[ActivationQuantizer] | None = None  # see rounded_parameters

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output: Tensor = self._conv_forward(input.float(), *rounded_parameters(self))
            return output


class QuantLinear(nn.Linear):
    """A linear layer whose weight and bias are rounded on every call to what the INT8 file holds."""

    rounding = True
    input_grid: tuple[ActivationQuantizer] | None = None  # see rounded_parameters

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output: Tensor = F.linear(input.float(), *rounded_parameters(self))
            return output


def rounded_parameters(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, Tensor | None]:
    """The weight [O, ...] and the bias [O] of a layer as its INT8 file has them; gradients pass straight through.

    `layer.input_grid` holds the one quantizer on whose grid the inputs lie; without one, the bias stays float. It is in
    a tuple so that torch takes it for no submodule: it has a path of its own. A channel of large weights, as folding
    gives one that is always zero, has large steps, and a bias that rounds to something else.
    """
    weight, bias = layer.weight, layer.bias
    if not layer.rounding:
        return weight, bias
    scale, step = weight_and_bias_steps(weight, bias, input_scale_of(layer))
    if bias is not None and step is not None:
        # The rounded bias comes first: added to a zero it stays exact.
        bias = (whole_bias(bias, step) * step).float() + (bias - bias.detach())
    return round_weight(weight, scale), bias


def input_scale_of(layer: QuantConv2d | QuantLinear) -> Tensor | None:
    """The step between two values of a layer's inputs, float32, []; None if they lie on no single grid."""
    return None if layer.input_grid is None else layer.input_grid[0].scale()


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
