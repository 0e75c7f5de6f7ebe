"""Copies between host and device on streams of their own, so that they overlap with computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


@cache
def _stream(device: torch.device, direction: Literal["upload", "download"]) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate host memory for copies from or to `device`: page-locked if it is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device, for use on its current stream, which the copy does not wait for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    stream, current = _stream(device, "upload"), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = pinned.to(device, non_blocking=True)
    current.wait_stream(stream)
    moved.record_stream(current)
    return moved


@dataclass(frozen=True)
class Download:
    """A copy on its way: the sources, which must live until it has ended, and what tells that it has."""

    sources: tuple[Tensor, ...]
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the targets have their values."""
        if self.event is not None:
            self.event.synchronize()


def download(copies: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Download:
    """Begin to copy tensors from the device: pairs of a target on the host, `empty_on_host`, and its source.

    Values are converted to the target's type, by the device. On CPUs the copy has ended on return.
    """
    if device.type != "cuda":
        for target, source in copies:
            target.copy_(source)
        return Download(())
    converted = tuple(source.to(target.dtype).contiguous() for target, source in copies)
    stream = _stream(device, "download")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for (target, _), source in zip(copies, converted, strict=True):
            target.copy_(source, non_blocking=True)
        event = stream.record_event()
    return Download(converted, event)
