"""Measure which layers INT8 affects most: each rounded alone, and each left float while all others are rounded.

worst = sensitivity(student, example, batches)[:2]
prepare_qat(student, example, exclude=[layer.path for layer in worst])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.compress.quantization.fake_quant import QuantConv2d, QuantLinear, quantizers_of, set_rounding
from kdpipe.stages.compress.quantization.fx_trace import module_of
from kdpipe.stages.compress.quantization.placement import quantizer_path, quantizers_after, rounded_nodes
from kdpipe.stages.compress.quantization.qat import calibrate, logits_of, prepare_qat, trace_folded
from kdpipe.stages.compress.targets import Grid
from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.data.measures import divergences
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.models.weights.state_dict import count_parameters


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect of INT8 on one convolution or linear layer, measured on the calibration images.

    Attributes:
        path: The layer's path.
        kl_alone: KL(float || rounded) of the softmax over the classes when only this layer is rounded (its weight, its
            output, and inputs that are rounded for it alone), in nats, mean over the images.
        kl_recovered: The decrease of the fully quantized network's divergence if quantize.exclude names this layer too;
            negative where that makes it worse.
        num_parameters: Of its weight and its bias, that of a folded batch norm included.
    """

    path: str
    kl_alone: float
    kl_recovered: float
    num_parameters: int


@dataclass(frozen=True)
class _Layer:
    """A layer, the modules that it has float if excluded, and those that round if only it does."""

    path: str
    to_float: list[nn.Module]
    to_round: list[nn.Module]


@torch.no_grad()
@tf32(enabled=False)
def sensitivity(
    model: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    *,
    exclude: Sequence[str] = (),
    grid: Grid = "affine",
    task: Task = CLASSIFICATION,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """Measure how much INT8 affects each layer; the worst first, by kl_recovered, then by path.

    It takes two forward passes per layer and batch. `batches` of normalized images [B, C, H, W] serve calibration and
    measurement, layers in `exclude` stay float and are not listed, and `on_progress` is called with (done, total) after
    each layer of each batch; it may raise to stop. The model stays unchanged. Of other tasks than classification the
    divergence is that of `kdpipe.stages.data.measures.divergences`.
    """
    prepared = prepare_qat(model, example, exclude, grid).eval()
    calibrate(prepared, batches)
    layers = _layers(prepared, model, example, exclude)
    device = next(prepared.parameters()).device
    alone, without = (dict.fromkeys((layer.path for layer in layers), 0.0) for _ in range(2))
    kl_full, done, total = 0.0, 0, len(layers) * len(batches)

    def divergence(reference: Tensor, found: Tensor) -> float:
        return float(divergences(task, reference, found).sum())

    for batch in batches:
        images = batch.to(device)
        reference = _logits(prepared, images, rounding=False)
        kl_full += divergence(reference, _logits(prepared, images, rounding=True))
        for layer in layers:
            for sums, switched, rounding in ((alone, layer.to_round, False), (without, layer.to_float, True)):
                sums[layer.path] += divergence(reference, _logits(prepared, images, rounding, switched))
            done += 1
            on_progress(done, total)
    num_images = sum(len(batch) for batch in batches)
    found = [
        LayerSensitivity(
            path=layer.path,
            kl_alone=alone[layer.path] / num_images,
            kl_recovered=(kl_full - without[layer.path]) / num_images,
            num_parameters=count_parameters(prepared.get_submodule(layer.path)),
        )
        for layer in layers
    ]
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
        outputs = [quantizer for node in calls for quantizer in quantizers_after(prepared, node)]
        layers.append(_Layer(path, to_float, [*to_float, *outputs]))
    return layers


def _logits(prepared: nn.Module, images: Tensor, rounding: bool, switched: Sequence[nn.Module] = ()) -> Tensor:
    """Return the logits with all rounding on or off, but for the `switched` modules."""
    set_rounding(prepared, rounding)
    for module in switched:
        set_rounding(module, not rounding)
    logits: Tensor = prepared(images)
    return logits
