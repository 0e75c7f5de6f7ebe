"""Which device this process computes on, chosen before torch touches a GPU: one GPU, the freest, and nobody else's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from stages.errors import RecipeError
from stages.machine.gpu_claims import CLAIMS
from stages.machine.gpu_taking import GpuTaking
from stages.machine.gpus import list_gpus
from stages.machine.visible_gpus import number_in
from stages.part import local_rank

_taken: dict[str, torch.device] = {}
"""What this process has taken, by the recipe's name for it."""


def take_device(
    name: str,
    *,
    share: bool = False,
    memory_fraction: float | None = None,
    warn: Callable[[str], None],
    claims: Path = CLAIMS,
) -> torch.device:
    """The device that a recipe's `device` names, made this process's own where it is a GPU. Nothing happens for cpu.

    auto and cuda take the freest GPU, which CUDA_VISIBLE_DEVICES is then set to, or, where that is set, the first
    one that it leaves; several processes that torchrun or srun started each take another one. CUDA_DEVICE_ORDER is set
    to PCI_BUS_ID where it is not set, so that numbers are nvidia-smi's. CUDA reads both once, at the first question
    (torch.cuda.is_available is one, a process group for GPUs too): this must come before. Again, it gives the same.

    share: whether a GPU that others use is taken all the same, with a warning. memory_fraction: how much of its memory
    torch may take, in (0, 1]. warn is told, in a sentence, of what people should know. claims: where `claim_gpu` keeps
    them. Raises LockedError, naming the user, where a GPU is in use, RecipeError where the recipe's is absent.
    """
    if name not in _taken:
        _taken[name] = _take(name, GpuTaking((), os.environ, share=share, warn=warn, claims=claims), memory_fraction)
    return _taken[name]


def _take(name: str, taking: GpuTaking, memory_fraction: float | None) -> torch.device:
    asked = name != "cpu" and _may_choose()
    if asked:
        taking = replace(taking, gpus=list_gpus() or ())
        taking.take(name)
    device = choose_device(name)
    if device.type == "cpu":
        taking.undo()
        return device
    if asked and not taking.gpus:
        taking.warn("the driver's library NVML does not answer: whether other processes use the GPU cannot be seen.")
    if device.index:
        torch.cuda.set_device(device)  # what names no device, such as pinned memory, would open the first GPU too
    if memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
    return device


def _may_choose() -> bool:
    """Whether this torch can use GPUs, and has not begun to: what it sees of them cannot change any more then."""
    return bool(torch.backends.cuda.is_built()) and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def choose_device(name: str) -> torch.device:
    """auto and cuda are the first GPU that CUDA_VISIBLE_DEVICES leaves, auto the CPU where there is none; of several
    processes that a launcher starts on a machine, each takes the next GPU. Raises RecipeError for an absent one.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, wanted = torch.cuda.device_count(), number_in(name)
    if (wanted or 0) >= count:
        raise RecipeError(
            f"the recipe's device is {name!r}, and torch sees {count} GPUs: set device = 'auto', or one that is there."
        )
    return torch.device("cuda", (local_rank(os.environ) or 0) % count if wanted is None else wanted)
