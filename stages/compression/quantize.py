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

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    require_observed,
    set_rounding,
)
from stages.compression.fold_batchnorm import fold_batchnorms
from stages.compression.fx_trace import module_of, trace
from stages.compression.op_kinds import Kind, is_float_tensor, kind_of, origin
from stages.errors import ModelError

QUANTIZERS = "quantizers"  # the activation quantizers' path; each is named after the node whose output it rounds


def prepare_qat(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """A copy of `model` for INT8 fine-tuning, in its training mode and on its device; `model` stays as it is.

    `example` [B, C, H, W] is a batch of normalised images, of which only the shape counts. Rounded are: the images,
    the weights of every Conv2d and Linear, and what convolutions, linears, additions, products, concatenations and
    pools give, after the ReLU where one follows. The logits stay float. Dropout modules work on; what a forward does by
    asking for self.training (torchvision's stochastic depth) stays as it is in eval mode. Raises ModelError if the
    model cannot be traced, does not run on `example`, or gives anything but one tensor.
    """
    if hasattr(model, QUANTIZERS):
        raise ModelError(f"the model already has a module {QUANTIZERS!r}: has it been prepared before?")
    device = next(model.parameters(), example).device
    prepared = trace(bare_copy(model), example.to(device))
    if not is_float_tensor(_logits(prepared)):
        raise ModelError("the model cannot be quantized: it must return one tensor of logits and nothing else.")
    fold_batchnorms(prepared)
    _round_weights(prepared)
    _place_quantizers(prepared, device)
    prepared.recompile()
    prepared.train(model.training)
    return prepared


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


def _logits(traced: fx.GraphModule) -> fx.Node:
    """The node that the model returns; the output node itself if that is no single node."""
    output = next(node for node in traced.graph.nodes if node.op == "output")
    return output.args[0] if isinstance(output.args[0], fx.Node) else output


def _round_weights(traced: fx.GraphModule) -> None:
    """Replace every convolution and linear layer that the graph calls by its rounding twin, parameters kept."""
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if type(layer) is nn.Conv2d or type(layer) is nn.Linear:
            traced.set_submodule(str(node.target), _rounding_twin(layer))


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


def _place_quantizers(traced: fx.GraphModule, device: torch.device) -> None:
    """Put an activation quantizer behind every value that INT8 arithmetic gives or takes."""
    traced.add_submodule(QUANTIZERS, nn.Module())
    logits = origin(traced, _logits(traced))
    for node in [node for node in traced.graph.nodes if node is not logits and _wants_rounding(traced, node)]:
        path = f"{QUANTIZERS}.{node.name}"
        traced.add_submodule(path, ActivationQuantizer().to(device))
        with traced.graph.inserting_after(node):
            rounded = traced.graph.call_module(path, (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)
        rounded.meta = dict(node.meta)


def _wants_rounding(traced: fx.GraphModule, node: fx.Node) -> bool:
    kind = kind_of(traced, node)
    if kind in ("same", "move") or not is_float_tensor(node):
        return False
    nearest = _readers(traced, node, ("same",))
    if kind == "int8" and len(nearest) == 1 and kind_of(traced, nearest[0]) == "rectifier":
        return False  # the rectifier's output is rounded instead
    readers = _readers(traced, node, ("same", "move"))
    return kind in ("int8", "rectifier") or any(kind_of(traced, reader) == "int8" for reader in readers)


def _readers(traced: fx.GraphModule, node: fx.Node, through: tuple[Kind, ...]) -> list[fx.Node]:
    """The nodes that read `node`'s values, looking through nodes of the given kinds."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(traced, user, through) if kind_of(traced, user) in through else [user]
    return found
