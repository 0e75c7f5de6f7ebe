"""Device selection, before torch touches a GPU: one GPU, the freest that is not in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.gpu.claims import CLAIMS
from kdpipe.stages.runtime.gpu.nvml import device_index, list_gpus
from kdpipe.stages.runtime.gpu.select import GpuSelector
from kdpipe.stages.runtime.launcher import local_rank

_taken: dict[str, torch.device] = {}
"""The devices of this process, by the recipe's name for them."""


def select_device(
    name: str,
    *,
    share: bool = False,
    memory_fraction: float | None = None,
    warn: Callable[[str], None],
    claims: Path = CLAIMS,
) -> torch.device:
    """Return the device that a recipe's `device` names, reserved for this process where it is a GPU.

    auto and cuda select the freest GPU, to which CUDA_VISIBLE_DEVICES is then set, or, where that is set, the first of
    its GPUs; each of several processes of torchrun or srun selects another one. CUDA_DEVICE_ORDER is set to PCI_BUS_ID
    where it is unset, so that numbers are nvidia-smi's. CUDA reads both variables once, at the first call
    (torch.cuda.is_available, or a process group for GPUs): call this before. Repeated calls return the same device.

    Args:
        name: The recipe's device: auto, cpu, cuda or cuda:N.
        share: Whether a GPU in use is selected all the same, with a warning.
        memory_fraction: The part of the GPU's memory that torch may use, in (0, 1].
        warn: Receives each warning, a sentence.
        claims: The folder of the claims on GPUs.

    Raises:
        LockedError: The GPU is in use; the message names the user.
        RecipeError: There is no such device.
    """
    if name not in _taken:
        _taken[name] = _take(name, GpuSelector((), os.environ, share=share, warn=warn, claims=claims), memory_fraction)
    return _taken[name]


def _take(name: str, selector: GpuSelector, memory_fraction: float | None) -> torch.device:
    wants_gpu = name != "cpu" and _may_choose()
    if wants_gpu:
        selector = replace(selector, gpus=list_gpus() or ())
        selector.select(name)
    device = choose_device(name)
    if device.type == "cpu":
        selector.undo()
        return device
    if wants_gpu and not selector.gpus:
        selector.warn("NVML, the driver's library, is not available: cannot check whether other processes use the GPU.")
    if device.index:
        torch.cuda.set_device(device)  # else pinned memory, which names no device, would open the first GPU too
    if memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
    return device


def _may_choose() -> bool:
    """Return whether torch is built for GPUs and not initialized yet: afterwards its visible GPUs are fixed."""
    return bool(torch.backends.cuda.is_built()) and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def choose_device(name: str) -> torch.device:
    """Return the device of that name among those that torch sees; raises RecipeError where it is absent.

    auto and cuda are the first visible GPU, auto the CPU where there is none; each of several processes that a launcher
    starts on a machine gets the next GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, wanted = torch.cuda.device_count(), device_index(name)
    if (wanted or 0) >= count:
        raise RecipeError(
            f"the recipe's device is {name!r}, and torch sees {count} GPUs: set device = 'auto', or one that is there."
        )
    return torch.device("cuda", (local_rank(os.environ) or 0) % count if wanted is None else wanted)
