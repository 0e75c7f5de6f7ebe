"""Device selection, before torch touches a GPU: the idle GPU with the most free memory, or the named one, claimed."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.gpu.nccl import BACKEND, gpu_backend
from kdpipe.stages.runtime.gpu.nvml import EXCLUSIVE, ORDER, PROHIBITED, VISIBLE, Gpu, list_gpus, visible_gpus
from kdpipe.stages.runtime.gpu.users import (
    CLAIMS,
    claim_gpu,
    gpu_user,
    is_ancestor,
    is_foreign,
    is_launched,
    release_gpu,
)
from kdpipe.stages.runtime.launcher import local_rank
from kdpipe.store import LockedError
from kdpipe.store.fs.lock import Holder

ADVICE = "wait for it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."
ADVICE_ALONE = "wait for it, or name another GPU with CUDA_VISIBLE_DEVICES."

CPU_ONLY = (
    f"torch {torch.__version__} is built for CPUs only: install a build for CUDA (https://pytorch.org/get-started), or "
    "set device to 'cpu'."
)

_selected: dict[str, torch.device] = {}
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
    if name not in _selected:
        selector = GpuSelector((), os.environ, share=share, warn=warn, claims=claims)
        _selected[name] = _select(name, selector, memory_fraction)
    return _selected[name]


def choose_device(name: str) -> torch.device:
    """Return the device of that name among those that torch sees; raises RecipeError where it is absent.

    auto and cuda are the first visible GPU, auto the CPU where there is none; each of several processes that a launcher
    starts on a machine gets the next GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, number = torch.cuda.device_count(), _number(name)
    if (number or 0) >= count:
        raise RecipeError(
            f"device is {name!r}, and torch sees {count} GPUs: set it to 'auto', or to one that is there."
            if _is_cuda_build()
            else f"device is {name!r}, and {CPU_ONLY}"
        )
    return torch.device("cuda", (local_rank(os.environ) or 0) % count if number is None else number)


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device that torch means, the current GPU by "cuda"; raises RecipeError where it is absent."""
    choose_device(str(name))
    device = torch.device(name)
    has_number = device.type != "cuda" or device.index is not None
    return device if has_number else torch.device("cuda", torch.cuda.current_device())


def check_device(given: str | torch.device) -> str | torch.device:
    """Return an argument `device` if it is one that kdpipe computes on. Raises RecipeError otherwise."""
    if isinstance(given, torch.device):
        choose_device(str(given))
    if not isinstance(given, str | torch.device) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(given)):
        raise RecipeError(f"device is {given!r:.40}: give 'auto', 'cpu', 'cuda', or 'cuda:0' for a certain GPU.")
    return given


@dataclass(frozen=True)
class GpuSelector:
    """The selection of one of `gpus` under the variables in `environ`.

    With `share` a GPU in use is selected all the same, with a warning. `claims` is the folder of the claims.
    """

    gpus: Sequence[Gpu]
    environ: MutableMapping[str, str]
    share: bool
    warn: Callable[[str], None]
    claims: Path = CLAIMS

    def select(self, name: str) -> bool:
        """Claim the freest GPU if `name` and CUDA_VISIBLE_DEVICES leave the choice; returns whether they do.

        Otherwise call `reserve` when torch has found its GPUs. Raises LockedError if all are in use, RecipeError if no
        process may use one, or other processes of this job use them.
        """
        if not self.gpus:
            return False
        self.environ.setdefault(ORDER, "PCI_BUS_ID")
        if VISIBLE in self.environ or _number(name) is not None:
            return False
        self.environ[VISIBLE] = self._freest().uuid
        return True

    def reserve(self, name: str, uuid: str) -> None:
        """Claim the GPU that torch uses, by its UUID there; if NVML does not list that, by its number. Raises as above.

        Numbers may differ: a container or a batch system shows CUDA some of the GPUs that NVML lists, renumbered.
        """
        number, visible = _number(name), visible_gpus(self.gpus, self.environ)
        position = self._rank % max(1, len(visible)) if number is None else number
        by_number = visible[position] if position < len(visible) else None
        gpu = next((gpu for gpu in self.gpus if gpu.uuid.partition("-")[2] == uuid), by_number)
        if gpu is None:
            self.warn("NVML does not list the GPU that torch uses: cannot check whether other processes use it.")
        else:
            self._reserve(gpu, is_named=number is not None)

    def undo(self) -> None:
        """Release all claims, for GPUs that torch cannot use."""
        visible = visible_gpus(self.gpus, self.environ)
        if visible:
            self.warn(f"torch can use none of {len(visible)} GPUs (is the driver too old?): running on the CPU.")
        for gpu in self.gpus:
            release_gpu(gpu.uuid, self.claims)

    @property
    def _rank(self) -> int:
        return local_rank(self.environ) or 0

    def _user(self, gpu: Gpu) -> str | None:
        return gpu_user(gpu, is_launched(self.environ))

    def _is_sibling(self, holder: Holder | None) -> bool:
        """Return whether the holder of a claim is another process of this job, or the one that started it."""
        if holder is None or holder.host != socket.gethostname():
            return False
        return is_ancestor(holder.pid) or (is_launched(self.environ) and not is_foreign(holder.pid, launched=True))

    def _reserve(self, gpu: Gpu, *, is_named: bool) -> None:
        if gpu.compute_mode == PROHIBITED:
            raise RecipeError(f"{gpu} is closed to computing (its compute mode is Prohibited): name another GPU.")
        holder = claim_gpu(gpu.uuid, self.claims)
        if self._is_sibling(holder):
            if not is_named:
                self._share_with_sibling(gpu)
            return
        # The driver's answer comes first: it includes how much memory a process uses.
        user = self._user(gpu) or (None if holder is None else str(holder))
        if user is not None:
            self._share(gpu, user)

    def _freest(self) -> Gpu:
        """Claim and return the idle, unclaimed GPU with the most free memory.

        Else, with `share`, return one that a process of the same job has claimed; else one in use.
        """
        usable = [gpu for gpu in self.gpus if gpu.compute_mode != PROHIBITED]
        if not usable:
            raise RecipeError(f"{self.gpus[0]} and all others are closed to computing (compute mode Prohibited).")
        users = {gpu.uuid: self._user(gpu) for gpu in usable}
        ranked = sorted(usable, key=lambda gpu: (-gpu.free_bytes, gpu.index))
        idle, busy = ([gpu for gpu in ranked if (users[gpu.uuid] is None) is is_idle] for is_idle in (True, False))
        # Each process of a job begins with another GPU: without claims, too, two rarely select the same.
        first = self._rank % max(1, len(idle))
        siblings: list[Gpu] = []
        for gpu in [*idle[first:], *idle[:first], *busy]:
            holder = claim_gpu(gpu.uuid, self.claims)
            if holder is None and users[gpu.uuid] is None:
                return gpu
            if holder is None:
                release_gpu(gpu.uuid, self.claims)
            elif self._is_sibling(holder):
                siblings.append(gpu)
            else:
                users[gpu.uuid] = users[gpu.uuid] or str(holder)
        if siblings:
            chosen = sorted(siblings, key=lambda gpu: (gpu.index, gpu.uuid))[self._rank % len(siblings)]
            self._share_with_sibling(chosen)
            return chosen
        freest = [*idle, *busy][0]
        all_of_them = f"all {len(usable)} GPUs are in use; the freest, " if len(usable) > 1 else ""
        self._share(freest, str(users[freest.uuid]), all_of_them)
        return freest

    def _share_with_sibling(self, gpu: Gpu) -> None:
        """Raise RecipeError for more processes than GPUs, unless sharing is asked for."""
        if is_launched(self.environ) and not self.share and gpu_backend(self.environ) == "nccl":
            raise RecipeError(
                f"another process of this job uses {gpu}, and there is none left for process {self._rank} of this "
                f"machine: start one process for each GPU, or let them share it with --share (those that train "
                f"together with {BACKEND}=gloo)."
            )

    def _share(self, gpu: Gpu, user: str, others: str = "") -> None:
        """Share a GPU in use, with a warning; without `share` raise LockedError."""
        if not self.share or gpu.compute_mode == EXCLUSIVE:
            release_gpu(gpu.uuid, self.claims)
            alone = gpu.compute_mode == EXCLUSIVE
            which, advice = (", which lets in one process at a time,", ADVICE_ALONE) if alone else ("", ADVICE)
            raise LockedError(f"{others}{gpu}{which} is in use by {user}: {advice}")
        claim_gpu(gpu.uuid, self.claims)  # for the time after its user has ended
        self.warn(f"{gpu} is shared with {user}: both run slower, and may run out of GPU memory.")


def _select(name: str, selector: GpuSelector, memory_fraction: float | None) -> torch.device:
    # Once torch has initialized CUDA, its visible GPUs are fixed.
    may_choose = _is_cuda_build() and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    is_claimed = False
    if name != "cpu" and may_choose:
        selector = replace(selector, gpus=list_gpus() or ())
        is_claimed = selector.select(name)
    device = choose_device(name)
    if device.type == "cpu":
        selector.undo()
        if name == "auto" and not _is_cuda_build() and (unused := list_gpus()):
            selector.warn(f"running on the CPU, and not on {unused[0]}: {CPU_ONLY}")
        return device
    if selector.gpus and not is_claimed:
        selector.reserve(name, str(torch.cuda.get_device_properties(device).uuid))
    elif may_choose and not selector.gpus:
        selector.warn("NVML, the driver's library, is not available: cannot check whether other processes use the GPU.")
    if device.index:
        torch.cuda.set_device(device)  # else pinned memory, which names no device, would open the first GPU too
    if memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
    return device


def _is_cuda_build() -> bool:
    return bool(torch.backends.cuda.is_built())  # type: ignore[no-untyped-call]


def _number(name: str) -> int | None:
    """Return the number in a recipe's device such as cuda:1, among the visible GPUs; None where it has none."""
    _, _, number = name.partition(":")
    return int(number) if number else None
