"""How big a network is and how much it computes: parameters, and multiply-accumulates for one image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.compression.bare_copy import bare_copy
from stages.errors import ModelError, cause


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image [C, H, W] in eval mode: convolutions, linear layers, and attention's products.

    Biases, norms, activations, pools and fake quantization count nothing, and a weight that is zero counts like any
    other. The model stays as it is and its hooks are not called. Raises ModelError if it does not run on such an image.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton with it

    copy = bare_copy(model).eval()
    parameter = next(copy.parameters(), torch.zeros(()))
    image = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad(), _attention_in_products(), FlopCounterMode(display=False) as counter:
            copy(image)
    except Exception as fault:
        raise ModelError(f"the model does not run on an image of shape {list(image_shape)}: {cause(fault)}") from fault
    return int(counter.get_total_flops()) // 2  # a multiplication and an addition are two


@contextmanager
def _attention_in_products() -> Iterator[None]:
    """Attention as single matrix products: its fused kernels are unknown to the counter on some devices."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
