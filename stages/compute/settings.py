"""How a network is computed: its precision, the memory format of its images and weights, and compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.runtime.cpu import has_bfloat16

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

MemoryFormat = Literal["contiguous", "channels_last"]

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ComputeSettings:
    """How the forward pass of a network is computed.

    Attributes:
        precision: "bfloat16" and "float16" are autocast; "tf32" rounds the inputs of float32 products on CUDA;
            "float32" rounds nothing.
        memory_format: Memory format of images [B, C, H, W] and of the weights of convolutions.
        compile: Whether torch.compile compiles the network.
        folded: Whether batch norms in evaluation are folded into the convolutions before them.
    """

    precision: Precision = "float32"
    memory_format: MemoryFormat = "contiguous"
    compile: bool = False
    folded: bool = False

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type of autocast; None without autocast."""
        return _AUTOCAST.get(self.precision)

    def place(self, model: nn.Module) -> None:
        """Convert a network's weights to channels_last if that is the format, in place; values and hooks stay."""
        if self.memory_format == "channels_last":
            for tensor in _tensors(model):
                if tensor.dim() == 4:  # others have no such format
                    tensor.data = tensor.data.to(memory_format=torch.channels_last)  # one channel: strides too

    @contextmanager
    def placed(self, model: nn.Module) -> Iterator[None]:
        """Have a network's weights in the memory format within the block, and in their own after it."""
        strides = [(tensor, tensor.stride()) for tensor in _tensors(model)]
        self.place(model)
        try:
            yield
        finally:
            for tensor, stride in strides:
                if tensor.stride() != stride:
                    own = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
                    tensor.data = own.copy_(tensor.data)

    def place_images(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W] in the memory format."""
        if self.memory_format == "channels_last":
            return images.contiguous(memory_format=torch.channels_last)
        return images.contiguous()

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Compute in the precision within the block.

        Autocast keeps no copies of the weights: it would use them until the caller's own autocast region ends, if there
        is one, however the weights change.
        """
        dtype = self.autocast_dtype
        with (
            tf32(enabled=self.precision == "tf32"),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            yield

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        return record if self.folded else {key: record[key] for key in record if key != "folded"}  # the older form

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ComputeSettings:
        """Read settings from a record. Raises TypeError, KeyError or ValueError for an invalid one."""
        folded = record.get("folded", False)
        settings = ComputeSettings(record["precision"], record["memory_format"], record["compile"], folded)
        if settings.precision not in get_args(Precision) or settings.memory_format not in get_args(MemoryFormat):
            raise ValueError(f"unknown settings: {record}")
        return settings

    def __str__(self) -> str:
        parts = [self.precision, *([self.memory_format] if self.memory_format != "contiguous" else [])]
        return ", ".join([*parts, *["folded batch norms"] * self.folded, *["compiled"] * self.compile])


EXACT = ComputeSettings()
"""float32, contiguous, not compiled."""


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def fast_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions besides float32 that a device computes in hardware, the most exact first.

    CPUs without bfloat16 products, and CUDA's older GPUs, only emulate it. float16 is no faster than float32 on CPUs.
    """
    if device.type == "cpu":
        return ("bfloat16",) if has_bfloat16() else ()
    if device.type != "cuda":
        return ()
    major, _ = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return (*(("tf32",) if major >= 8 else ()), "float16", *(("bfloat16",) if has_bf16 else ()))
