"""Count a network's multiply-accumulates for one image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import model_errors


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of one image [C, H, W]: convolutions, linear layers, attention products.

    Biases, norms, activations, pools and fake quantization count nothing, and zero weights count like any other. The
    model runs in eval mode, stays unchanged, and its hooks are not called.

    Raises:
        ModelError: If the model does not run on such an image.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    copy = clone_without_hooks(model).eval()
    parameter = next(copy.parameters(), torch.zeros(()))
    image = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    with model_errors(image), torch.no_grad(), _unfused_attention(), FlopCounterMode(display=False) as counter:
        copy(image)
    return int(counter.get_total_flops()) // 2  # two operations per MAC


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Run attention as separate matrix products: on some devices the counter does not know its fused kernels."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
