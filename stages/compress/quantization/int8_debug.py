"""Find the first operation of an INT8 file whose integers differ from those of the prepared network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx

from kdpipe.stages.compress.quantization.fake_quant import quantizers_of
from kdpipe.stages.compress.quantization.fx_trace import module_of
from kdpipe.stages.compress.quantization.qdq_graph import int8_graph
from kdpipe.stages.compress.quantization.qdq_layers import QuantizeDequantize
from kdpipe.stages.export.onnx_debug import NOWHERE, Divergence, capture_outputs, compare_floats, run_onnx, with_outputs
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, module_path

FED = "fed."
"""Prefix of the graph inputs that replace values of the file."""


@dataclass(frozen=True)
class Rounding:
    """A value that the file rounds: its name, the operation that computes it, and the path of torch's quantizer."""

    value: str
    place: str
    quantizer: str


def first_int8_divergence(proto: onnx.ModelProto, prepared: fx.GraphModule, images: Tensor) -> str:
    """Return a clause naming the first operation whose integers are more than one step from torch's.

    Every operation is given the integers that the network has before it, so the faulty place shows, not what follows
    from it. One step is tolerated, since a kernel may round a near-tie the other way.
    """
    plain, fused = (int8_divergences(proto, prepared, images, optimized=optimized) for optimized in (False, True))
    for divergences, remark in ((plain, ""), (fused, ", and only where onnxruntime fuses the operations")):
        for found in divergences:
            if found.share:
                return f"{found}{remark}"
    worst = max(fused, key=lambda found: found.num_one_off)
    if not worst.num_one_off:
        return NOWHERE
    return (
        "at no single operation: given torch's integers, each returns the same ones or some that are one step off (the "
        f"most, {worst.num_one_off}, at {worst.place}), as rounding of near-ties may, and these add up"
    )


def int8_divergences(
    proto: onnx.ModelProto, prepared: fx.GraphModule, images: Tensor, *, optimized: bool
) -> list[Divergence]:
    """Compare each operation's integers with torch's on `images` [B, C, H, W], in the file's order, logits last.

    The connections between the operations are cut, and the network's integers are fed in. With `optimized` the
    operations run fused, as onnxruntime does, else each alone and in float.
    """
    quantizers = quantizers_of(prepared)
    outputs = capture_outputs(prepared, list(quantizers), images)
    roundings = _roundings(proto, prepared)
    whole = run_onnx(_with_integers(proto, roundings), {INPUT: images}, optimized=optimized)
    fed = {}
    for rounding in roundings:
        scale, zero_point = quantizers[rounding.quantizer].scale_and_zero_point()
        integers = torch.round(outputs[rounding.quantizer] / scale) + zero_point
        fed[rounding.value] = integers.to(torch.uint8).reshape(whole[rounding.value].shape)
    feeds = {INPUT: images} | {FED + name: integers for name, integers in fed.items()}
    found = run_onnx(_cut(_with_integers(proto, roundings), fed), feeds, optimized=optimized)
    divergences = [
        _compare_steps(rounding.place, found[rounding.value].int() - fed[rounding.value].int())
        for rounding in roundings
    ]
    return [*divergences, compare_floats("the logits", found[OUTPUT], outputs[""])]


def _compare_steps(place: str, steps: Tensor) -> Divergence:
    """Summarize differences in quantization steps, of any shape."""
    steps = steps.abs()
    share = float((steps > 1).double().mean())
    return Divergence(place, share, int(steps.max()), "quantization steps", int((steps == 1).sum()))


def _roundings(proto: onnx.ModelProto, prepared: fx.GraphModule) -> list[Rounding]:
    """Match the file's roundings with the quantizers, in the order of the exported graph.

    Moved values pass their quantizer again, in another order: of a quantizer's calls, only the first one counts. Empty
    if the file has another number of roundings, as one that was exported otherwise may.
    """
    graph = int8_graph(prepared)
    paths = [str(n.target) for n in graph.graph.nodes if isinstance(module_of(graph, n), QuantizeDequantize)]
    nodes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    if len(nodes) != len(paths):
        return []
    found: dict[str, Rounding] = {}
    for node, path in zip(nodes, paths, strict=True):
        found.setdefault(path, Rounding(node.output[0], _place(proto, node), path))
    return list(found.values())


def _place(proto: onnx.ModelProto, rounding: onnx.NodeProto) -> str:
    """Name the first operation between the rounding of a value and the integers before it, as "path (operator)"."""
    producers = {value: node for node in proto.graph.node for value in node.output}
    node = rounding
    while node.input[0] in producers and producers[node.input[0]].op_type != "DequantizeLinear":
        node = producers[node.input[0]]
    return "the images" if node is rounding else f"{module_path(node) or node.name} ({node.op_type})"


def _with_integers(proto: onnx.ModelProto, roundings: Sequence[Rounding]) -> onnx.ModelProto:
    return with_outputs(proto, [rounding.value for rounding in roundings], onnx.TensorProto.UINT8)


def _cut(proto: onnx.ModelProto, fed: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Make the readers of the `fed` integers read graph inputs instead; changes `proto`."""
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name in fed:
                node.input[index] = FED + name
    for name, integers in fed.items():
        info = onnx.helper.make_tensor_value_info(FED + name, onnx.TensorProto.UINT8, list(integers.shape))
        proto.graph.input.append(info)
    return proto
