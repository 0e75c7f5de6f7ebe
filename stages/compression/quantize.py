"""INT8 quantization-aware training: a float model becomes one that computes, in float, what its INT8 file will compute.

    prepared = prepare_qat(student, example)      # batch norms folded, weights and activations on INT8 grids
    calibrate(prepared, batches)                  # first ranges, before the first step
    ...fine-tune as any other model; freeze_observers(prepared) for the last part...
    export_onnx(prepared, ...)

The prepared model is a torch.fx GraphModule that still has every module path of the original: forward hooks on a
layer, a block or a stage, state_dict, train() and eval() work as they do there. It is rebuilt without pickle:
prepare_qat on the model built from its architecture, then load_state_dict(strict=True).

Batch norms are folded into the weights *first*, and the folded weights are trained: what is rounded is then exactly
what the file holds, and there are no running statistics to freeze. The price is the missing normalisation: fine-tune
with about a tenth of the learning rate that the float model was fine-tuned with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import (
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    require_observed,
    set_rounding,
)
from stages.compression.fold_batchnorm import fold_batchnorms
from stages.compression.fx_trace import module_of, trace
from stages.compression.int8_places import QUANTIZERS, place_quantizers, rounded_nodes, tell_input_grids
from stages.compression.op_kinds import is_float_tensor, kind_of
from stages.errors import ModelError


def prepare_qat(model: nn.Module, example: Tensor, exclude: Sequence[str] = ()) -> fx.GraphModule:
    """A copy of `model` for INT8 fine-tuning, in its training mode and on its device; `model` stays as it is.

    `example` [B, C, H, W] is a batch of normalised images, of which only the shape counts. Rounded are: the images,
    the weights and biases of every Conv2d and Linear, and what convolutions, linears, additions, products,
    concatenations and pools give, after the ReLU where one follows. The logits stay float, and so do linear layers'
    outputs and sums that only float work reads (a transformer's residual stream). nn.MultiheadAttention is float work
    too, its projections included; so are normalisations that no layer absorbs, and activations other than ReLU and
    ReLU6. Dropout modules work on; what a forward does by asking for self.training (torchvision's stochastic depth)
    stays as it is in eval mode.

    `exclude` names modules, layers or whole blocks, that compute in float: their weights are not rounded (batch
    norms are folded all the same), their outputs only where INT8 work reads them. Functional operations in a block's
    forward belong to it. The same names must be given again when the model is rebuilt.

    Raises ModelError if the model cannot be traced, does not run on `example`, or gives anything but one tensor; if
    `exclude` names what is not there or holds nothing to quantize; and if nothing is left to quantize.
    """
    if hasattr(model, QUANTIZERS):
        raise ModelError(f"the model already has a module {QUANTIZERS!r}: has it been prepared before?")
    prepared = trace_folded(model, example)
    nodes = rounded_nodes(prepared, model, logits_of(prepared), exclude)
    _round_weights(prepared)
    place_quantizers(prepared, nodes, next(model.parameters(), example).device)
    tell_input_grids(prepared)
    prepared.recompile()
    prepared.train(model.training)
    return prepared


def trace_folded(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a copy of `model` with its batch norms folded, nothing rounded yet. Raises what prepare_qat does."""
    traced = trace(bare_copy(model), example.to(next(model.parameters(), example).device))
    if not is_float_tensor(logits_of(traced)):
        raise ModelError("the model cannot be quantized: it must return one tensor of logits and nothing else.")
    fold_batchnorms(traced)
    return traced


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let a prepared model see `batches` of normalised images [B, C, H, W] in float, to learn its activation ranges.

    Starts no range anew: more batches refine them. Dropout is off; the model's training mode stays. Raises ModelError
    if the model is not prepared, or there is no batch.
    """
    quantizers = quantizers_of(model)
    modes = {module: module.training for module in model.modules()}
    device = next(iter(quantizers.values())).low.device
    set_rounding(model, False)
    try:
        model.eval()
        for quantizer in quantizers.values():
            quantizer.train()
        with torch.no_grad():
            for images in batches:
                model(images.to(device))
    finally:
        set_rounding(model, True)
        for module, training in modes.items():
            module.training = training
    require_observed(quantizers)


def freeze_observers(model: nn.Module) -> None:
    """Freeze every activation range of a prepared model: the last part of the fine-tuning needs a fixed grid.

    Raises ModelError if the model is not prepared or has seen no batch yet.
    """
    quantizers = quantizers_of(model)
    require_observed(quantizers)
    for quantizer in quantizers.values():
        quantizer.freeze()


def logits_of(traced: fx.GraphModule) -> fx.Node:
    """The node that the model returns; the output node itself if that is no single node."""
    output = next(node for node in traced.graph.nodes if node.op == "output")
    return output.args[0] if isinstance(output.args[0], fx.Node) else output


def _round_weights(traced: fx.GraphModule) -> None:
    """Replace every convolution and linear layer that the graph calls in INT8 by its rounding twin, parameters kept."""
    num_rounding = 0
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if kind_of(traced, node) == "int8" and type(layer) in (nn.Conv2d, nn.Linear):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            traced.set_submodule(str(node.target), _rounding_twin(layer))
            num_rounding += 1
    if not num_rounding:
        raise ModelError("the model has nothing left to quantize: no convolution or linear layer would be in INT8.")


def _rounding_twin(layer: nn.Conv2d | nn.Linear) -> QuantConv2d | QuantLinear:
    """The same layer, with the same parameter objects, of the class that rounds."""
    twin: QuantConv2d | QuantLinear
    if isinstance(layer, nn.Conv2d):
        twin = QuantConv2d(
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
        twin = QuantLinear(layer.in_features, layer.out_features, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin
