"""INT8 quantization-aware training: a float model becomes one that computes, in float, what its INT8 file computes.

    prepared = prepare_qat(student, example)      # batch norms folded, weights and activations on INT8 grids
    calibrate(prepared, batches)                  # first ranges, before the first step
    ...fine-tune like any other model; freeze_observers(prepared) for the last part...
    export_onnx(prepared, ...)

The prepared model is a torch.fx GraphModule that keeps every module path of the original: forward hooks on a layer, a
block or a stage, state_dict, train() and eval() work as before. It is rebuilt without pickle: prepare_qat on the model
built from its architecture, then load_state_dict(strict=True).

Batch norms are folded into the weights *first*, and the folded weights are trained: what is rounded is then exactly
what the file stores, and there are no running statistics to freeze. The price is the missing normalization: fine-tune
with about a tenth of the float model's learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    require_observed,
    set_rounding,
    weight_scale,
)
from kdpipe.stages.compress.quantization.fx_trace import Traced, fold_batchnorms, module_of, trace
from kdpipe.stages.compress.quantization.op_types import is_float_tensor, kind_of
from kdpipe.stages.compress.quantization.placement import QUANTIZERS, place_quantizers, rounded_nodes, set_input_grids
from kdpipe.stages.compress.quantization.qdq_graph import int8_graph
from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.clone import clone_without_hooks, preserve_modes
from kdpipe.stages.models.hooks import get_module


class QatModel(fx.GraphModule):
    """A model prepared for INT8 fine-tuning."""

    def for_export(self) -> fx.GraphModule:
        """Return the graph of the INT8 file. Raises ModelError if the model was never calibrated."""
        return int8_graph(self)


def prepare_qat(
    model: nn.Module,
    example: Tensor,
    exclude: Sequence[str] = (),
    grid: Grid = "affine",
    *,
    int4: Collection[str] = (),
    learns_steps: bool = False,
) -> QatModel:
    """Return a copy of `model` for INT8 fine-tuning, in its training mode and on its device.

    Rounded are the images, the weights and biases of every Conv2d and Linear, and the outputs of convolutions, linears,
    additions, products, concatenations and pools, after the ReLU where one follows. The logits stay float, as do linear
    outputs and sums that only float operations read (a transformer's residual stream), nn.MultiheadAttention with its
    projections, normalizations that no layer absorbs, and activations other than ReLU and ReLU6. Dropout modules work;
    what a forward does depending on self.training (torchvision's stochastic depth) stays as in eval mode.

    Args:
        model: The float network; it stays unchanged.
        example: Normalized images [B, C, H, W], of which only the shape counts.
        exclude: Paths of modules that compute in float: their weights are not rounded (batch norms are still folded),
            their outputs only where INT8 operations read them. Rebuilding the model needs the same paths.
        grid: Of the activations: "affine", or "symmetric" for TensorRT.
        int4: Paths of rounding layers whose weights have 4 bits: `int4_candidates`, or some of them.
        learns_steps: Whether the scales are parameters, "step_size", which start from the weights and the calibration.

    Raises:
        ModelError: If the model cannot be traced, does not run on `example`, or returns anything but one tensor; if
            `exclude` names a missing module or one without anything to quantize; or if nothing is left to quantize.
    """
    if hasattr(model, QUANTIZERS):
        raise ModelError(f"the model already has a module {QUANTIZERS!r}: it was prepared before.")
    prepared = trace_folded(model, example, QatModel)
    nodes = rounded_nodes(prepared, model, logits_of(prepared), exclude)
    if not nodes:
        reason = "every layer is in quantize.exclude" if exclude else "no layer of it has an INT8 form"
        raise ModelError(f"the model has nothing left to quantize: {reason}. Take 'quantize' out of compress.steps.")
    _round_weights(prepared)
    place_quantizers(prepared, nodes, next(model.parameters(), example).device, grid)
    set_input_grids(prepared)
    for path in int4:
        layer = get_module(prepared, path)
        if not isinstance(layer, QuantConv2d | QuantLinear):
            raise ModelError(f"{path!r} cannot have weights of 4 bits: it is no layer that INT8 computes.")
        layer.bits = 4
    if learns_steps:
        _learn_steps(prepared)
    prepared.recompile()
    prepared.train(model.training)
    return prepared


def int4_candidates(model: nn.Module, example: Tensor, exclude: Sequence[str] = ()) -> list[str]:
    """Return the paths of the layers whose weights can have 4 bits, in the order of their calls.

    They are those that `prepare_qat` rounds, but for the first and the last layer of the network.

    Raises:
        ModelError: If there are none, or as `prepare_qat`.
    """
    traced = trace_folded(model, example, fx.GraphModule)
    rounded_nodes(traced, model, logits_of(traced), exclude)
    called = [node for node in traced.graph.nodes if type(module_of(traced, node)) in (nn.Conv2d, nn.Linear)]
    ends = {str(node.target) for node in (*called[:1], *called[-1:])}
    rounding = (str(node.target) for node in called if kind_of(traced, node) == "int8")
    found = [path for path in dict.fromkeys(rounding) if path not in ends]
    if not found:
        raise ModelError(
            "the model has no layer whose weights could have 4 bits: its first and last layer keep 8, as do those in "
            "quantize.exclude. Set compress.quantize.scheme = 'int8'."
        )
    return found


def trace_folded(model: nn.Module, example: Tensor, graph_class: type[Traced]) -> Traced:
    """Return the graph, of class `graph_class`, of a copy of `model` with its batch norms folded, nothing rounded."""
    traced = trace(clone_without_hooks(model), example.to(next(model.parameters(), example).device), graph_class)
    if not is_float_tensor(logits_of(traced)):
        raise ModelError("the model cannot be quantized: it must return a single tensor of logits.")
    fold_batchnorms(traced)
    return traced


@tf32(enabled=False)
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Run a prepared model in float on `batches` of normalized images [B, C, H, W] to set its activation ranges.

    Further calls refine the ranges. Dropout is off; the model's training mode stays. Raises ModelError if the model is
    not prepared, or there is no batch.
    """
    quantizers = quantizers_of(model)
    device = next(iter(quantizers.values())).low.device
    set_rounding(model, False)
    try:
        with preserve_modes(model), torch.no_grad():
            model.eval()
            for quantizer in quantizers.values():
                quantizer.train()
            for images in batches:
                model(images.to(device))
    finally:
        set_rounding(model, True)
    require_observed(quantizers)
    for quantizer in quantizers.values():
        if quantizer.step_size is not None:
            quantizer.step_size.data.copy_(quantizer.observed_scale())


def freeze_observers(model: nn.Module) -> None:
    """Freeze every activation range of a prepared model: the last part of fine-tuning needs a fixed grid.

    Raises ModelError if the model is not prepared or not calibrated.
    """
    quantizers = quantizers_of(model)
    require_observed(quantizers)
    for quantizer in quantizers.values():
        quantizer.freeze()


def logits_of(traced: fx.GraphModule) -> fx.Node:
    """Return the node that the model returns, or the output node itself if that is not a single node."""
    output = next(node for node in traced.graph.nodes if node.op == "output")
    return output.args[0] if isinstance(output.args[0], fx.Node) else output


def _round_weights(traced: fx.GraphModule) -> None:
    """Replace every convolution and linear layer called in INT8 by its rounding version, parameters kept."""
    num_rounding = 0
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if kind_of(traced, node) == "int8" and type(layer) in (nn.Conv2d, nn.Linear):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            traced.set_submodule(str(node.target), _rounding_layer(layer))
            num_rounding += 1
    if not num_rounding:
        raise ModelError("the model has nothing left to quantize: every layer is in quantize.exclude.")


def _learn_steps(prepared: fx.GraphModule) -> None:
    """Make the scales of weights and activations parameters; those of activations are NaN until the calibration."""
    for module in prepared.modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            module.step_size = nn.Parameter(weight_scale(module.weight, module.bits))
        elif isinstance(module, ActivationQuantizer):
            module.step_size = nn.Parameter(torch.full_like(module.low, torch.nan))


def _rounding_layer(layer: nn.Conv2d | nn.Linear) -> QuantConv2d | QuantLinear:
    """Return the rounding version of a layer, with the same parameter objects."""
    rounding: QuantConv2d | QuantLinear
    if isinstance(layer, nn.Conv2d):
        rounding = QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    else:
        rounding = QuantLinear(layer.in_features, layer.out_features, device="meta")
    rounding.weight, rounding.bias = layer.weight, layer.bias
    rounding.register_parameter("step_size", None)
    return rounding
