"""Choose the layers whose weights have 4 bits under a budget of bytes: the least harmful for what they save.

    paths, harms = choose_int4(prepared, int4_candidates(student, example), batches, budget=0.75)
    prepare_qat(student, example, int4=paths)

The harm is measured once for each layer, without labels, while all others have 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.quantization.fake_quant import QuantConv2d, QuantLinear, set_rounding
from kdpipe.stages.compress.quantization.qat import calibrate
from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.data.measures import divergences
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import ModelError


@torch.no_grad()
@tf32(enabled=False)
def choose_int4(
    prepared: nn.Module,
    candidates: Sequence[str],
    batches: Sequence[Tensor],
    *,
    budget: float,
    task: Task = CLASSIFICATION,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[str], dict[str, float]]:
    """Return the layers that get 4 bits, in the order of their choice, and the harm that each candidate does.

    The harm is the increase of the mean KL divergence, in nats, from the outputs without rounding (of other tasks that
    of `kdpipe.stages.data.measures.divergences`). It takes a forward pass for each candidate and batch.

    Args:
        prepared: A network in INT8 of `prepare_qat`; it is calibrated here, and otherwise unchanged.
        candidates: Paths of layers that may have 4 bits.
        batches: Normalized images [B, C, H, W], for calibration and measurement.
        budget: The bytes of the weights that are left, as a share of those in INT8.
        task: What the network does.
        on_progress: Called with (done, total) after each candidate of each batch; it may raise to stop.

    Raises:
        ModelError: As `require_reachable`, and `calibrate`.
    """
    require_reachable(prepared, candidates, budget)
    calibrate(prepared, batches)
    prepared.eval()
    device = next(prepared.parameters()).device
    rounding = _rounding_layers(prepared)
    layers = {path: rounding[path] for path in candidates}
    harms, done = dict.fromkeys(candidates, 0.0), 0
    num_images = sum(len(batch) for batch in batches)
    for batch in batches:
        images = batch.to(device)
        set_rounding(prepared, False)
        expected = prepared(images)
        set_rounding(prepared, True)
        before = float(divergences(task, expected, prepared(images)).sum())
        for path, layer in layers.items():
            layer.bits = 4
            try:
                harms[path] += (float(divergences(task, expected, prepared(images)).sum()) - before) / num_images
            finally:
                layer.bits = 8
            done += 1
            on_progress(done, len(layers) * len(batches))
    return _cheapest(prepared, harms, budget), harms


def require_reachable(prepared: nn.Module, candidates: Sequence[str], budget: float) -> None:
    """Raise ModelError if the weights of a network would exceed the budget with 4 bits in all candidates."""
    sizes = _weight_bytes(prepared)
    least = (sum(sizes.values()) - sum(sizes[path] // 2 for path in candidates)) / sum(sizes.values())
    if least > budget:
        raise ModelError(
            f"compress.quantize.budget = {budget} cannot be reached: with 4 bits in all layers that may have them, the "
            f"weights take {least:.3f} of their bytes in INT8. Set a budget of that or more, or leave it out."
        )


def _cheapest(prepared: nn.Module, harms: Mapping[str, float], budget: float) -> list[str]:
    """Return the layers of the least harm for a byte that they save, until the rest is within the budget."""
    sizes = _weight_bytes(prepared)
    left, whole = sum(sizes.values()), sum(sizes.values())
    chosen: list[str] = []
    for path in sorted(harms, key=lambda path: harms[path] / max(1, sizes[path] // 2)):
        if left <= budget * whole:
            break
        chosen.append(path)
        left -= sizes[path] // 2
    return chosen


def _weight_bytes(prepared: nn.Module) -> dict[str, int]:
    """Return the bytes of the weight of each rounding layer in INT8, by path."""
    return {path: layer.weight.numel() for path, layer in _rounding_layers(prepared).items()}


def _rounding_layers(prepared: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {path: one for path, one in prepared.named_modules() if isinstance(one, QuantConv2d | QuantLinear)}
