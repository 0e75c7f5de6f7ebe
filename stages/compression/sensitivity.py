"""Which layers INT8 hurts: each one rounded alone, and each one spared while all the others are rounded.

worst = sensitivity(student, example, batches)[:2]
prepare_qat(student, example, exclude=[layer.path for layer in worst])
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from stages.compression.fake_quant import QuantConv2d, QuantLinear, quantizers_of, set_rounding
from stages.compression.fx_trace import module_of
from stages.compression.int8_places import quantizer_path, quantizers_behind, rounded_nodes
from stages.compression.quantize import calibrate, logits_of, prepare_qat, trace_folded

Heard = dict[nn.Module, list[Tensor]]  # what modules gave, call by call


@dataclass(frozen=True)
class LayerSensitivity:
    """What INT8 does to one convolution or linear layer, measured on the calibration images.

    sqnr_db: 10 log10 of the power of what the layer gives in the float network, after the rectifier where one follows,
    over the power of its change when this layer alone is rounded: its weight, its output, and inputs that are rounded
    for it alone. kl_alone: what that changes in the prediction: the Kullback-Leibler divergence KL(float || rounded)
    of the softmax over the classes, in nats, mean over the images. kl_spared: by how much the divergence of the fully
    quantized network falls if exclude names this layer too; negative where that makes it worse.
    num_parameters: of its weight and its bias, that of a folded batch norm included.
    """

    path: str
    sqnr_db: float
    kl_alone: float
    kl_spared: float
    num_parameters: int


@dataclass
class _Part:
    """A layer, the modules that switch to float when it is spared, those that round when it alone does, and where its
    output is heard. The rest are sums over the images: powers, and divergences in nats."""

    path: str
    spared: list[nn.Module]
    alone: list[nn.Module]
    heard_at: list[nn.Module]
    signal: float = 0
    noise: float = 0
    kl_alone: float = 0
    kl_spared: float = 0


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    *,
    exclude: Sequence[str] = (),
    between: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """How much each layer suffers from INT8, the worst first: by kl_spared, then by path.

    `model` is the float network and stays as it is; `batches` are normalised images [B, C, H, W], for the calibration
    and for the measurement alike. Layers in `exclude` are float throughout and not listed. `between(done, total)` is
    called after each layer of each batch and may raise to end it. Costs two forward passes a layer. Raises ModelError
    as prepare_qat and calibrate do.
    """
    prepared = prepare_qat(model, example, exclude).eval()
    calibrate(prepared, batches)
    parts = _parts(prepared, model, example, exclude)
    device = next(prepared.parameters()).device
    kl_full, done, total = 0.0, 0, len(parts) * len(batches)
    for batch in batches:
        images = batch.to(device)
        clean, reference = _float_run(prepared, parts, images)
        kl_full += _divergence(reference, prepared(images))
        for part in parts:
            _measure(prepared, part, images, clean, reference)
            done += 1
            between(done, total)
    num_images = sum(len(batch) for batch in batches)
    found = [_judged(prepared, part, kl_full, num_images) for part in parts]
    return sorted(found, key=lambda layer: (-layer.kl_spared, layer.path))


def _parts(prepared: fx.GraphModule, model: nn.Module, example: Tensor, exclude: Sequence[str]) -> list[_Part]:
    """The rounding layers of a prepared model, in the order in which they are called."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if isinstance(module_of(prepared, node), QuantConv2d | QuantLinear):
            nodes.setdefault(str(node.target), []).append(node)
    plain, quantizers = trace_folded(model, example), quantizers_of(prepared)
    parts = []
    for path, calls in nodes.items():
        layer = prepared.get_submodule(path)
        left = {quantizer_path(node) for node in rounded_nodes(plain, model, logits_of(plain), [*exclude, path])}
        spared = [layer, *(quantizer for where, quantizer in quantizers.items() if where not in left)]
        outputs: list[nn.Module] = [quantizer for node in calls for quantizer in quantizers_behind(prepared, node)]
        parts.append(_Part(path, spared, [*spared, *outputs], outputs or [layer]))
    return parts


def _float_run(prepared: nn.Module, parts: Sequence[_Part], images: Tensor) -> tuple[Heard, Tensor]:
    """What the parts and the whole network give without any rounding."""
    set_rounding(prepared, False)
    with _hear([module for part in parts for module in part.heard_at]) as clean:
        reference = prepared(images)
    set_rounding(prepared, True)
    return clean, reference


def _measure(prepared: nn.Module, part: _Part, images: Tensor, clean: Heard, reference: Tensor) -> None:
    """Add a batch to the part's sums: once it alone rounds, once all the others do."""
    set_rounding(prepared, False)
    _switch(part.alone, True)
    with _hear(part.heard_at) as rounded:
        part.kl_alone += _divergence(reference, prepared(images))
    for module in part.heard_at:
        for wanted, found in zip(clean[module], rounded[module], strict=True):
            part.signal += float(wanted.double().square().sum())
            part.noise += float((found.double() - wanted.double()).square().sum())
    set_rounding(prepared, True)
    _switch(part.spared, False)
    part.kl_spared += _divergence(reference, prepared(images))
    set_rounding(prepared, True)


def _judged(prepared: nn.Module, part: _Part, kl_full: float, num_images: int) -> LayerSensitivity:
    ratio = part.signal / part.noise if part.noise else math.inf
    return LayerSensitivity(
        path=part.path,
        sqnr_db=10 * math.log10(ratio) if ratio else -math.inf,
        kl_alone=part.kl_alone / num_images,
        kl_spared=(kl_full - part.kl_spared) / num_images,
        num_parameters=sum(parameter.numel() for parameter in prepared.get_submodule(part.path).parameters()),
    )


def _switch(modules: Collection[nn.Module], on: bool) -> None:
    for module in modules:
        set_rounding(module, on)


@contextlib.contextmanager
def _hear(modules: Collection[nn.Module]) -> Iterator[Heard]:
    """What each module gives, call by call, while the context lasts."""
    heard: Heard = {module: [] for module in modules}
    handles = [
        module.register_forward_hook(lambda module, inputs, output: heard[module].append(output)) for module in heard
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _divergence(reference: Tensor, found: Tensor) -> float:
    """KL(reference || found) of the softmax of logits [B, num_classes], in nats, summed over the images."""
    wanted, given = (logits.double().log_softmax(dim=1) for logits in (reference, found))
    return float((wanted.exp() * (wanted - given)).sum())
