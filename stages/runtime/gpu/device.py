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
from kdpipe.stages.runtime.gpu.nvml import ORDER, VISIBLE, Gpu, list_gpus, visible_gpus
from kdpipe.stages.runtime.gpu.users import CLAIMS, claim_gpu, gpu_user, is_foreign, is_launched, release_gpu
from kdpipe.stages.runtime.launcher import local_rank
from kdpipe.store import LockedError
from kdpipe.store.fs.lock import Holder

ADVICE = "wait for it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."

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
        )
    return torch.device("cuda", (local_rank(os.environ) or 0) % count if number is None else number)


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

    def select(self, name: str) -> None:
        """Claim the GPU that `choose_device` will return for `name`. Raises LockedError where it is in use."""
        if not self.gpus:
            return
        self.environ.setdefault(ORDER, "PCI_BUS_ID")
        number = _number(name)
        if VISIBLE not in self.environ and number is None:
            self.environ[VISIBLE] = self._freest().uuid
            return
        visible = visible_gpus(self.gpus, self.environ)
        position = self._rank % max(1, len(visible)) if number is None else number
        if position < len(visible) and (gpu := visible[position]) is not None:
            self._reserve(gpu)

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
        """Return whether the holder of a claim is another process of this job."""
        if holder is None or holder.host != socket.gethostname() or not is_launched(self.environ):
            return False
        return not is_foreign(holder.pid, launched=True)

    def _reserve(self, gpu: Gpu) -> None:
        holder = claim_gpu(gpu.uuid, self.claims)
        if self._is_sibling(holder):
            return
        # The driver's answer comes first: it includes how much memory a process uses.
        user = self._user(gpu) or (None if holder is None else str(holder))
        if user is not None:
            self._share(gpu, user)

    def _freest(self) -> Gpu:
        """Claim and return the idle, unclaimed GPU with the most free memory.

        Else return one that a process of the same job has claimed; else, with `share`, one in use.
        """
        users = {gpu.uuid: self._user(gpu) for gpu in self.gpus}
        ranked = sorted(self.gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index))
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
            return sorted(siblings, key=lambda gpu: (gpu.index, gpu.uuid))[self._rank % len(siblings)]
        freest = [*idle, *busy][0]
        self._share(
            freest,
            str(users[freest.uuid]),
            f"all {len(self.gpus)} GPUs are in use; the freest, " if len(self.gpus) > 1 else "",
        )
        return freest

    def _share(self, gpu: Gpu, user: str, others: str = "") -> None:
        """Share a GPU in use, with a warning; without `share` raise LockedError."""
        if not self.share:
            release_gpu(gpu.uuid, self.claims)
            raise LockedError(f"{others}{gpu} is in use by {user}: {ADVICE}")
        claim_gpu(gpu.uuid, self.claims)  # for the time after its user has ended
        self.warn(f"{gpu} is shared with {user}: both run slower, and may run out of GPU memory.")


def _select(name: str, selector: GpuSelector, memory_fraction: float | None) -> torch.device:
    # Once torch has initialized CUDA, its visible GPUs are fixed.
    may_choose = torch.backends.cuda.is_built() and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    wants_gpu = name != "cpu" and may_choose
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


def _number(name: str) -> int | None:
    """Return the number in a recipe's device such as cuda:1, among the visible GPUs; None where it has none."""
    _, _, number = name.partition(":")
    return int(number) if number else None
