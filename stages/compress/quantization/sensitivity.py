"""Measure which layers INT8 affects most: each rounded alone, and each left float while all others are rounded.

worst = sensitivity(student, example, batches)[:2]
prepare_qat(student, example, exclude=[layer.path for layer in worst])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.compress.quantization.fake_quant import QuantConv2d, QuantLinear, quantizers_of, set_rounding
from kdpipe.stages.compress.quantization.fx_trace import module_of
from kdpipe.stages.compress.quantization.placement import quantizer_path, quantizers_after, rounded_nodes
from kdpipe.stages.compress.quantization.qat import calibrate, logits_of, prepare_qat, trace_folded
from kdpipe.stages.models.hooks import capture


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect of INT8 on one convolution or linear layer, measured on the calibration images.

    Attributes:
        path: The layer's path.
        sqnr_db: 10 log10 of the power of the layer's output in the float network, after a following rectifier, over the
            power of its change when only this layer is rounded: its weight, its output, and inputs that are
            rounded for it alone.
        kl_alone: KL(float || rounded) of the softmax over the classes when only this layer is rounded, in nats, mean
            over the images.
        kl_recovered: The decrease of the fully quantized network's divergence if quantize.exclude names this layer too;
            negative where that makes it worse.
        num_parameters: Of its weight and its bias, that of a folded batch norm included.
    """

    path: str
    sqnr_db: float
    kl_alone: float
    kl_recovered: float
    num_parameters: int


@dataclass
class _Layer:
    """A layer, the modules that switch to float or round for its measurements, and sums over the images."""

    path: str
    to_float: list[nn.Module]
    to_round: list[nn.Module]
    outputs: list[nn.Module]
    signal: float = 0
    noise: float = 0
    kl_alone: float = 0
    kl_recovered: float = 0


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    *,
    exclude: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """Measure how much INT8 affects each layer; the worst first, by kl_recovered, then by path.

    It takes two forward passes per layer and batch. `batches` of normalized images [B, C, H, W] serve calibration and
    measurement, layers in `exclude` stay float and are not listed, and `on_progress` is called with (done, total) after
    each layer of each batch; it may raise to stop. The model stays unchanged.
    """
    prepared = prepare_qat(model, example, exclude).eval()
    calibrate(prepared, batches)
    layers = _layers(prepared, model, example, exclude)
    device = next(prepared.parameters()).device
    kl_full, done, total = 0.0, 0, len(layers) * len(batches)
    for batch in batches:
        images = batch.to(device)
        clean, reference = _float_run(prepared, layers, images)
        kl_full += _divergence(reference, prepared(images))
        for layer in layers:
            _measure(prepared, layer, images, clean, reference)
            done += 1
            on_progress(done, total)
    num_images = sum(len(batch) for batch in batches)
    found = [_summarize(prepared, layer, kl_full, num_images) for layer in layers]
    return sorted(found, key=lambda result: (-result.kl_recovered, result.path))


def _layers(prepared: fx.GraphModule, model: nn.Module, example: Tensor, exclude: Sequence[str]) -> list[_Layer]:
    """Return the rounding layers of a prepared model, in call order."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if isinstance(module_of(prepared, node), QuantConv2d | QuantLinear):
            nodes.setdefault(str(node.target), []).append(node)
    plain, quantizers = trace_folded(model, example, fx.GraphModule), quantizers_of(prepared)
    layers = []
    for path, calls in nodes.items():
        module = prepared.get_submodule(path)
        remaining = {quantizer_path(node) for node in rounded_nodes(plain, model, logits_of(plain), [*exclude, path])}
        to_float = [module, *(quantizer for place, quantizer in quantizers.items() if place not in remaining)]
        outputs: list[nn.Module] = [quantizer for node in calls for quantizer in quantizers_after(prepared, node)]
        layers.append(_Layer(path, to_float, [*to_float, *outputs], outputs or [module]))
    return layers


def _float_run(
    prepared: nn.Module, layers: Sequence[_Layer], images: Tensor
) -> tuple[dict[nn.Module, list[Tensor]], Tensor]:
    """Return the outputs of the layers and the logits without any rounding."""
    set_rounding(prepared, False)
    with capture([module for layer in layers for module in layer.outputs]) as clean:
        reference = prepared(images)
    set_rounding(prepared, True)
    return clean, reference


def _measure(
    prepared: nn.Module, layer: _Layer, images: Tensor, clean: dict[nn.Module, list[Tensor]], reference: Tensor
) -> None:
    """Add a batch to the layer's sums: once with only it rounded, once with all others rounded."""
    set_rounding(prepared, False)
    for module in layer.to_round:
        set_rounding(module, True)
    with capture(layer.outputs) as rounded:
        layer.kl_alone += _divergence(reference, prepared(images))
    for module in layer.outputs:
        for expected, found in zip(clean[module], rounded[module], strict=True):
            layer.signal += float(expected.double().square().sum())
            layer.noise += float((found.double() - expected.double()).square().sum())
    set_rounding(prepared, True)
    for module in layer.to_float:
        set_rounding(module, False)
    layer.kl_recovered += _divergence(reference, prepared(images))
    set_rounding(prepared, True)


def _summarize(prepared: nn.Module, layer: _Layer, kl_full: float, num_images: int) -> LayerSensitivity:
    ratio = layer.signal / layer.noise if layer.noise else math.inf
    return LayerSensitivity(
        path=layer.path,
        sqnr_db=10 * math.log10(ratio) if ratio else -math.inf,
        kl_alone=layer.kl_alone / num_images,
        kl_recovered=(kl_full - layer.kl_recovered) / num_images,
        num_parameters=sum(parameter.numel() for parameter in prepared.get_submodule(layer.path).parameters()),
    )


def _divergence(reference: Tensor, found: Tensor) -> float:
    """Return KL(reference || found) of the softmax of logits [B, num_classes], in nats, summed over the images."""
    expected, given = (logits.double().log_softmax(dim=1) for logits in (reference, found))
    return float((expected.exp() * (expected - given)).sum())
