"""Fake-quantized layers: they simulate INT8 in float and let the gradient through.

Activations have 256 values with one scale per tensor, on one of two grids: "affine", from the lowest value to the
highest with a zero point (the integers of onnxruntime, OpenVINO and XNNPACK), or "symmetric", signed with zero point 0
(those of TensorRT). Weights are signed with 8 or 4 bits, symmetric, with one scale per output channel; biases are
signed 32-bit, in steps of input scale times weight scale (the method: Jacob et al. 2018, arXiv:1712.05877). Everything
computes in float32, also inside an autocast region: a grid of 256 values does not survive bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.stages.compress.quantization.learned_steps import learned_rounding
from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.errors import ModelError

ACTIVATION_RANGES: dict[Grid, tuple[int, int]] = {"affine": (0, 255), "symmetric": (-128, 127)}
"""The lowest and the highest integer of an activation."""
WEIGHT_RANGES = {8: (-127, 127), 4: (-8, 7)}
"""The lowest and the highest integer of a weight, by bits."""
# Half of int32's range: the bias and the sum of the products must fit together.
BIAS_MAX = 2**30
# For dead channels: a scale near zero overflows the int32 bias of the integer kernel.
SCALE_FLOOR = 2.0**-20
# The weight of a new batch in the observed range after 1 / MOMENTUM batches.
MOMENTUM = 0.01


class ActivationQuantizer(nn.Module):
    """A rounding of a tensor of any shape to 256 values over an observed range.

    In training mode the range follows the batches: their plain mean at first, a moving average later, and always
    including zero; `freeze` stops that. Its state is in its buffers: `low`, `high`, `num_batches`, `frozen`. Before the
    first batch the range is NaN, and so is the output. Gradients pass straight through where the input is within the
    range, and are zero where it was clipped.

    With a `step_size`, a parameter [], the range is observed in calibration alone, and the step is learned from there.
    """

    low: Tensor
    high: Tensor
    num_batches: Tensor
    frozen: Tensor
    step_size: nn.Parameter | None

    def __init__(self, grid: Grid = "affine") -> None:
        super().__init__()
        if grid not in ACTIVATION_RANGES:
            raise ValueError(f"no grid of activations is called {grid!r}")
        self.grid = grid
        self.rounding = True  # off while calibrating; not part of the state
        self.register_parameter("step_size", None)
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("frozen", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training and (self.step_size is None or not self.rounding):
            self._observe(x.detach())
        if not self.rounding:
            return x
        scale, zero_point = self.scale_and_zero_point()
        if self.step_size is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *ACTIVATION_RANGES[self.grid])
        rounded = torch.fake_quantize_per_tensor_affine(x.detach(), scale, zero_point, *ACTIVATION_RANGES[self.grid])
        bounds = torch.tensor(ACTIVATION_RANGES[self.grid], device=x.device) - zero_point
        return learned_rounding(x, self.step_size, rounded, scale=scale, bounds=bounds, num_values=x[0].numel())

    def _observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`, entirely on the device so that no step waits for the GPU."""
        lowest, highest = torch.aminmax(x)
        share = torch.clamp(1 / (self.num_batches + 1), min=MOMENTUM)
        for bound, image_batch in ((self.low, lowest.clamp(max=0)), (self.high, highest.clamp(min=0))):
            moved = torch.where(self.num_batches == 0, image_batch, bound + share * (image_batch - bound))
            bound.copy_(torch.where(self.frozen, bound, moved))
        self.num_batches += ~self.frozen

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the step between two values (float32, []) and the integer of zero (int32, [])."""
        scale = self.scale()
        if self.grid == "symmetric":
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        zero_point = torch.round(-self.low / self.observed_scale()).nan_to_num().clamp(*ACTIVATION_RANGES[self.grid])
        return scale, zero_point.to(torch.int32)

    def scale(self) -> Tensor:
        """Return the step between two values, float32, []; NaN before the first batch."""
        return self.observed_scale() if self.step_size is None else positive_step(self.step_size)

    def observed_scale(self) -> Tensor:
        """Return the step with which the values span the observed range, float32, []."""
        lowest, highest = ACTIVATION_RANGES[self.grid]
        if self.grid == "symmetric":
            return torch.clamp(torch.maximum(self.high, -self.low) / highest, min=SCALE_FLOOR)
        return torch.clamp((self.high - self.low) / (highest - lowest), min=SCALE_FLOOR)

    def freeze(self) -> None:
        """Keep the current range from now on, in training too."""
        self.frozen.fill_(True)


def positive_step(step_size: Tensor) -> Tensor:
    """Return the scales of learned step sizes, of any shape: their magnitudes, at least 2^-20."""
    return torch.clamp(step_size.detach().abs(), min=SCALE_FLOOR)


def weight_scale(weight: Tensor, bits: int = 8) -> Tensor:
    """Return each output channel's scale of a weight [O, ...]; [O].

    It is the channel's largest magnitude over 127 (7 with 4 bits), at least 2^-20.
    """
    return torch.clamp(weight.detach().flatten(1).abs().amax(dim=1) / WEIGHT_RANGES[bits][1], min=SCALE_FLOOR)


def round_weight(weight: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Round a weight [O, ...] to integer multiples, within `WEIGHT_RANGES[bits]`, of its channels' scales [O]."""
    zero_points = torch.zeros_like(scale)  # torch checks the range of int32 ones, and waits for the GPU to do so
    rounded: Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, *WEIGHT_RANGES[bits])
    return rounded


def weight_and_bias_scales(
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    bits: int = 8,
    step_size: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the scales of a weight [O, ...] of 8 or 4 bits and of a bias [O] in the file; both float32, [O].

    A bias counts in steps of input scale ([]) times weight scale. A channel with weights so small beside its bias that
    the bias would overflow gets a larger weight scale: such weights move its output by less than half a step anyway.
    Without an input scale, or a bias, the latter's scale is None. A learned `step_size` [O] is the weight's scale.
    """
    scale = weight_scale(weight, bits) if step_size is None else positive_step(step_size)
    if bias is None or input_scale is None:
        return scale, None
    scale = torch.maximum(scale, bias.detach().abs() / (input_scale * BIAS_MAX))
    return scale, scale * input_scale


def integer_bias(bias: Tensor, step: Tensor) -> Tensor:
    """Return a bias [O] in integer steps [O], float64: float32 does not represent all of int32's values."""
    return torch.round(bias.detach().double() / step)


class QuantConv2d(nn.Conv2d):
    """A convolution whose weight and bias are rounded on every call to the values in the INT8 file."""

    bits = 8  # of the weight: 8 or 4
    step_size: nn.Parameter | None  # [O], if the steps of the weight are learned
    rounding = True
    input_grid: tuple[ActivationQuantizer] | None = None  # see rounded_parameters

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output: Tensor = self._conv_forward(input.float(), *rounded_parameters(self))
            return output


class QuantLinear(nn.Linear):
    """A linear layer whose weight and bias are rounded on every call to the values in the INT8 file."""

    bits = 8  # of the weight: 8 or 4
    step_size: nn.Parameter | None  # [O], if the steps of the weight are learned
    rounding = True
    input_grid: tuple[ActivationQuantizer] | None = None  # see rounded_parameters

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output: Tensor = F.linear(input.float(), *rounded_parameters(self))
            return output


def rounded_parameters(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, Tensor | None]:
    """Return the weight [O, ...] and the bias [O] of a layer as in its INT8 file; gradients pass straight through.

    `layer.input_grid` is the quantizer of the inputs, wrapped in a tuple so that torch does not register it as a
    submodule; without one, the bias stays float. A channel with large weights, such as folding produces for one that is
    always zero, has large steps and a visibly rounded bias.
    """
    weight, bias = layer.weight, layer.bias
    if not layer.rounding:
        return weight, bias
    scale, step = weight_and_bias_scales(weight, bias, input_scale_of(layer), layer.bits, layer.step_size)
    if bias is not None and step is not None:
        # The rounded bias comes first: added to zero it stays exact.
        bias = (integer_bias(bias, step) * step).float() + (bias - bias.detach())
    if layer.step_size is None:
        return round_weight(weight, scale, layer.bits), bias
    rounded = round_weight(weight.detach(), scale, layer.bits)
    bounds, num_values = torch.tensor(WEIGHT_RANGES[layer.bits], device=weight.device), weight[0].numel()
    return learned_rounding(weight, layer.step_size, rounded, scale=scale, bounds=bounds, num_values=num_values), bias


def input_scale_of(layer: QuantConv2d | QuantLinear) -> Tensor | None:
    """Return the scale of a layer's inputs, float32, []; None if they are on no single grid."""
    return None if layer.input_grid is None else layer.input_grid[0].scale()


def set_rounding(model: nn.Module, on: bool) -> None:
    """Enable or disable the rounding of every quantized module."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | QuantConv2d | QuantLinear):
            module.rounding = on


def quantizers_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return a prepared model's activation quantizers by path. Raises ModelError if it has none."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, ActivationQuantizer)}
    if not found:
        raise ModelError("the model has no activation quantizers: call prepare_qat first.")
    return found


def require_observed(quantizers: dict[str, ActivationQuantizer]) -> None:
    """Raise ModelError, naming the first one, if a quantizer has observed no batch."""
    for path, quantizer in quantizers.items():
        if not int(quantizer.num_batches):
            raise ModelError(f"the activation range {path!r} has seen no batch yet: calibrate the model first.")
