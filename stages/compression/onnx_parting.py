"""Where an ONNX file and its network part: the first operation whose values are not those of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from stages.compression.bare_copy import bare_copy
from stages.compression.fake_quant import ActivationQuantizer, quantizers_of
from stages.compression.fx_trace import module_of
from stages.compression.int8_graph import int8_graph
from stages.compression.int8_layers import QuantizeDequantize
from stages.compression.onnx_graph import INPUT, OUTPUT, module_path, session_options

FLOAT_TOLERANCE = 1e-3
"""Float values part where they differ by more than this share of the largest magnitude of their tensor."""

FED = "fed."  # the name of the graph input that takes the place of a value of the file begins with this


@dataclass(frozen=True)
class Parting:
    """A place in a file, and how far its values are from torch's.

    share: of the values that are further than the tolerance. largest: the largest difference, in `unit`.
    num_one_off: of the INT8 values, how many are one quantization step off.
    """

    place: str
    share: float
    largest: float
    unit: str
    num_one_off: int = 0

    def __str__(self) -> str:
        return f"at {self.place} {100 * self.share:.3g} % of the values differ, by up to {self.largest:.4g} {self.unit}"


@dataclass(frozen=True)
class Rounding:
    """A value that the file rounds: its name, the operation whose output it is, and the path of the quantizer that
    rounds it in torch."""

    value: str
    place: str
    quantizer: str


def where_they_part(path: Path, model: nn.Module, images: Tensor) -> str:
    """One clause that names the first place at which the values of a file and of its network, in eval mode and on the
    CPU, part on `images` [B, C, H, W] (normalised, a few dozen), the share of its values that do, and how far.

    In an INT8 file every operation is given the very integers that the network has before it, so the place of the
    fault shows and not what follows from it; values part if they are more than one step apart, since a kernel may
    round a near-tie the other way. Float values part if they differ by 0.001 of the largest one.
    """
    images = images.cpu().float()
    reference = bare_copy(model).cpu().eval()
    proto = onnx.load(path)
    quantized = any(isinstance(module, ActivationQuantizer) for module in reference.modules())
    if not (quantized and isinstance(reference, fx.GraphModule)):
        first = next((each for each in float_partings(proto, reference, images) if each.share), None)
        return str(first) if first else "nowhere on these images"
    plain, fused = (int8_partings(proto, reference, images, optimized=each) for each in (False, True))
    for partings, remark in ((plain, ""), (fused, ", and only where onnxruntime fuses the operations")):
        for each in partings:
            if each.share:
                return f"{each}{remark}"
    most = max(fused, key=lambda each: each.num_one_off)
    if not most.num_one_off:
        return "nowhere on these images"
    return (
        "at no single operation: given torch's integers, each gives the same ones or some that are one step off (the "
        f"most, {most.num_one_off}, at {most.place}), as a value halfway between two may be, and these add up"
    )


# ---- INT8


def int8_partings(
    proto: onnx.ModelProto, prepared: fx.GraphModule, images: Tensor, *, optimized: bool
) -> list[Parting]:
    """How far each operation of the file is from torch's on `images` [B, C, H, W], in the file's order, logits last.

    Every operation is given torch's integers: the wires between the operations are cut, and what the network has there
    is fed in. `optimized`: as onnxruntime fuses the operations, or each for itself and in float.
    """
    quantizers = quantizers_of(prepared)
    outputs = _hear(prepared, list(quantizers), images)
    roundings = _roundings(proto, prepared)
    whole = _run(_tapped(proto, roundings), {INPUT: images}, optimized=optimized)
    fed = {}
    for each in roundings:
        scale, zero_point = quantizers[each.quantizer].scale_and_zero_point()
        integers = torch.round(outputs[each.quantizer] / scale) + zero_point
        fed[each.value] = integers.to(torch.uint8).reshape(whole[each.value].shape)
    feeds = {INPUT: images} | {FED + name: integers for name, integers in fed.items()}
    found = _run(_cut(_tapped(proto, roundings), fed), feeds, optimized=optimized)
    partings = [_steps_apart(each.place, found[each.value].int() - fed[each.value].int()) for each in roundings]
    return [*partings, _apart("the logits", found[OUTPUT], outputs[""])]


def _steps_apart(place: str, steps: Tensor) -> Parting:
    """`steps`: differences in quantization steps, of any shape."""
    steps = steps.abs()
    share = float((steps > 1).double().mean())
    return Parting(place, share, int(steps.max()), "quantization steps", int((steps == 1).sum()))


def _roundings(proto: onnx.ModelProto, prepared: fx.GraphModule) -> list[Rounding]:
    """The roundings of the file, each with its quantizer: their order is that of the graph that was exported.

    Moved values pass their quantizer again, in another order: of a quantizer's calls, only the first one counts. None
    at all if the file has another number of them, as one that was exported otherwise may.
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
    """The first operation between the rounding of a value and the integers before it, as "path (operator)"."""
    producers = {value: node for node in proto.graph.node for value in node.output}
    node = rounding
    while node.input[0] in producers and producers[node.input[0]].op_type != "DequantizeLinear":
        node = producers[node.input[0]]
    return "the images" if node is rounding else _named(node)


def _named(node: onnx.NodeProto) -> str:
    return f"{module_path(node) or node.name} ({node.op_type})"


def _tapped(proto: onnx.ModelProto, roundings: Sequence[Rounding]) -> onnx.ModelProto:
    """A copy of the file that also gives its integers."""
    names = [each.value for each in roundings]
    return _with_outputs(proto, names, onnx.TensorProto.UINT8)


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str], kind: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    return copy


def _cut(proto: onnx.ModelProto, fed: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Let the readers of the integers that are `fed` read inputs of the graph instead; changes `proto`."""
    for node in proto.graph.node:
        for at, name in enumerate(node.input):
            if name in fed:
                node.input[at] = FED + name
    for name, integers in fed.items():
        info = onnx.helper.make_tensor_value_info(FED + name, onnx.TensorProto.UINT8, list(integers.shape))
        proto.graph.input.append(info)
    return proto


def _run(proto: onnx.ModelProto, feeds: Mapping[str, Tensor], *, optimized: bool = True) -> dict[str, Tensor]:
    """Every output of an ONNX network by name, from onnxruntime's CPU."""
    options = session_options()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in proto.graph.output]
    found = session.run(names, {name: value.numpy() for name, value in feeds.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


# ---- float


def float_partings(proto: onnx.ModelProto, model: nn.Module, images: Tensor) -> list[Parting]:
    """How far the output of each layer of the file is from torch's on `images` [B, C, H, W], in the file's order,
    logits last: of each module without children of which a node of the file is part."""
    last = {module_path(node): node for node in proto.graph.node if module_path(node)}
    modules = dict(model.named_modules())
    paths = [path for path in last if path in modules and not list(modules[path].children())]
    outputs = _hear(model, paths, images)
    heard = [path for path in paths if path in outputs]
    values = {path: last[path].output[0] for path in heard if last[path].output[0] != OUTPUT}
    found = _run(_with_outputs(proto, list(values.values()), onnx.TensorProto.FLOAT), {INPUT: images})
    partings = [
        _apart(_layer(proto, last[path], path), found[value], outputs[path])
        for path, value in values.items()
        if found[value].shape == outputs[path].shape
    ]
    return [*partings, _apart("the logits", found[OUTPUT], outputs[""])]


def _layer(proto: onnx.ModelProto, node: onnx.NodeProto, path: str) -> str:
    """The path of the layer whose weight a node has, which is another where the exporter folded a batch norm."""
    weights = {each.name for each in proto.graph.initializer}
    owner = next((name.rpartition(".")[0] for name in node.input if name in weights and "." in name), path)
    return f"{owner or path} ({node.op_type})"


def _apart(place: str, found: Tensor, expected: Tensor) -> Parting:
    largest = float(expected.abs().max()) or 1.0
    apart = (found - expected).abs() / largest
    parted = ~(apart <= FLOAT_TOLERANCE)  # NaN parts too
    return Parting(place, float(parted.double().mean()), float(apart.max()), "of the largest one")


def _hear(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What the modules at `paths` give for `images`, if they are called once and give one tensor; "": the logits."""
    heard: dict[str, list[Any]] = {path: [] for path in paths}
    hooks = [model.get_submodule(path).register_forward_hook(_ear(heard[path])) for path in paths]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = {path: outputs[0] for path, outputs in heard.items() if len(outputs) == 1}
    return {path: output for path, output in once.items() if isinstance(output, Tensor)} | {"": logits}


def _ear(heard: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    def hear(_module: nn.Module, _inputs: Any, output: Any) -> None:
        heard.append(output.clone() if isinstance(output, Tensor) else output)  # what follows may work in place

    return hear
