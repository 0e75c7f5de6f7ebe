"""A prepared model turned into the graph of its ONNX file: quantize and dequantize around every operation (QDQ).

onnxruntime's CPU kernels fuse an operation with the Q and DQ around it, and only there: an addition or a pool left bare
runs in float and makes the file slower than the float one.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    quantizers_of,
    require_observed,
)
from stages.compression.fx_trace import module_of
from stages.compression.int8_layers import FloatLayer, QuantizeDequantize, int8_layer
from stages.compression.int8_places import quantizers_behind
from stages.compression.op_kinds import is_float_tensor, kind_of, origin, pool_window


def int8_graph(prepared: fx.GraphModule) -> fx.GraphModule:
    """The QDQ form of a calibrated prepared model, on the CPU, in eval mode; `prepared` stays as it is.

    Values that are only moved (max-pool, flatten, ...) keep their scale. Raises ModelError if it was never calibrated.
    """
    require_observed(quantizers_of(prepared))
    copy = bare_copy(prepared).cpu().eval()
    assert isinstance(copy, fx.GraphModule)
    for rewrite in (_requantize_after_move, _average_by_window):
        for node in list(copy.graph.nodes):
            rewrite(copy, node)
    _replace_layers(copy)
    _shield_float_layers(copy)
    for path, quantizer in quantizers_of(copy).items():
        copy.set_submodule(path, QuantizeDequantize(quantizer))
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def _requantize_after_move(copy: fx.GraphModule, node: fx.Node) -> None:
    """Let moved values pass their own quantizer once more: that changes none of them, but integers are moved then."""
    if kind_of(copy, node) == "move" and is_float_tensor(node) and _grid_of(copy, node) is not None:
        with copy.graph.inserting_after(node):
            again = copy.graph.call_module(str(origin(copy, node).target), (node,))
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        again.meta = dict(node.meta)


def _average_by_window(copy: fx.GraphModule, node: fx.Node) -> None:
    """Write a mean over maps as an average pool, flattened if need be: only that has an integer kernel."""
    window = pool_window(copy, node)
    if window is None:
        return
    reader = _quantizer_behind(copy, node)
    with copy.graph.inserting_before(node):
        averaged = copy.graph.call_function(F.avg_pool2d, (node.args[0], window))
        if len(node.meta["tensor_meta"].shape) == 2:
            if reader is not None:
                averaged = copy.graph.call_module(str(reader.target), (averaged,))
            averaged = copy.graph.call_function(torch.flatten, (averaged, 1))
    node.replace_all_uses_with(averaged)


def _replace_layers(copy: fx.GraphModule) -> None:
    """Give every rounding layer its integers. A bias counts in steps of the input's scale, so it needs a single one.

    A linear layer over more axes than [B, F] is a product and an addition in ONNX, and the addition stays float.
    """
    grids: dict[str, set[ActivationQuantizer | None]] = {}
    for node in copy.graph.nodes:
        layer = module_of(copy, node)
        if isinstance(layer, QuantConv2d | QuantLinear):
            is_fused = isinstance(layer, QuantConv2d) or len(node.args[0].meta["tensor_meta"].shape) == 2
            grid = _grid_of(copy, node.args[0]) if is_fused else None
            grids.setdefault(str(node.target), set()).add(grid)
    for path, quantizers in grids.items():
        quantizer = next(iter(quantizers)) if len(quantizers) == 1 else None
        input_scale = float(quantizer.scale_and_zero_point()[0]) if quantizer is not None else None
        layer = copy.get_submodule(path)
        assert isinstance(layer, QuantConv2d | QuantLinear)
        copy.set_submodule(path, int8_layer(layer, input_scale))


def _shield_float_layers(copy: fx.GraphModule) -> None:
    """Keep onnxruntime's hands off the weights of float layers between two grids: it would round them itself."""
    for node in copy.graph.nodes:
        layer = module_of(copy, node)
        if type(layer) not in (nn.Conv2d, nn.Linear) or _grid_of(copy, node.args[0]) is None:
            continue
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if quantizers_behind(copy, node):
            copy.set_submodule(str(node.target), FloatLayer(layer))


def _grid_of(copy: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer on whose grid the values of `node` lie, or None if they are plain floats."""
    module = module_of(copy, origin(copy, node))
    return module if isinstance(module, ActivationQuantizer) else None


def _quantizer_behind(copy: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The quantizer's call that alone reads `node`, or None."""
    reader = next(iter(node.users), node)
    return reader if len(node.users) == 1 and isinstance(module_of(copy, reader), ActivationQuantizer) else None
