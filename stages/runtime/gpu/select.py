"""GPU selection: the idle GPU with the most free memory, or the named one, reserved by a claim."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.stages.runtime.gpu.claims import CLAIMS, Claimant, claim_gpu, launcher, release_gpu
from kdpipe.stages.runtime.gpu.nvml import ORDER, VISIBLE, Gpu, device_index, visible_gpus
from kdpipe.stages.runtime.gpu.users import gpu_user
from kdpipe.stages.runtime.launcher import local_rank
from kdpipe.store import LockedError

ADVICE = "wait for it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."


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
        number = device_index(name)
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
        return gpu_user(gpu, launcher(self.environ) is not None)

    def _claim(self, gpu: Gpu) -> Claimant | None:
        return claim_gpu(gpu.uuid, self.environ, self.claims)

    def _reserve(self, gpu: Gpu) -> None:
        claimant = self._claim(gpu)
        if claimant is not None and claimant.is_sibling:
            return
        # The driver's answer comes first: it includes how much memory a process uses.
        user = self._user(gpu) or (None if claimant is None else str(claimant.holder))
        if user is None:
            return
        if not self.share:
            release_gpu(gpu.uuid, self.claims)
            raise LockedError(f"{gpu} is in use by {user}: {ADVICE}")
        self._warn_shared(gpu, user)

    def _freest(self) -> Gpu:
        """Claim and return the idle, unclaimed GPU with the most free memory.

        Else return one that a process of the same job has claimed; else, with `share`, one in use.
        """
        users = {gpu.uuid: self._user(gpu) for gpu in self.gpus}
        ranked = sorted(self.gpus, key=_by_free_memory)
        idle, busy = ([gpu for gpu in ranked if (users[gpu.uuid] is None) is is_idle] for is_idle in (True, False))
        # Each process of a job begins with another GPU: without claims, too, two rarely select the same.
        first = self._rank % max(1, len(idle))
        siblings: list[Gpu] = []
        for gpu in [*idle[first:], *idle[:first], *busy]:
            claimant = self._claim(gpu)
            if claimant is None and users[gpu.uuid] is None:
                return gpu
            if claimant is None:
                release_gpu(gpu.uuid, self.claims)
            elif claimant.is_sibling:
                siblings.append(gpu)
            else:
                users[gpu.uuid] = users[gpu.uuid] or str(claimant.holder)
        if siblings:
            return sorted(siblings, key=lambda gpu: (gpu.index, gpu.uuid))[self._rank % len(siblings)]
        best = next(gpu for gpu in [*idle, *busy])
        return self._shared(best, str(users[best.uuid]))

    def _shared(self, gpu: Gpu, user: str) -> Gpu:
        if not self.share:
            others = f"all {len(self.gpus)} GPUs are in use; the freest, " if len(self.gpus) > 1 else ""
            raise LockedError(f"{others}{gpu} is in use by {user}: {ADVICE}")
        self._claim(gpu)  # for the time after its user has ended
        self._warn_shared(gpu, user)
        return gpu

    def _warn_shared(self, gpu: Gpu, user: str) -> None:
        self.warn(f"{gpu} is shared with {user}: both run slower, and may run out of GPU memory.")


def _by_free_memory(gpu: Gpu) -> tuple[int, int]:
    return -gpu.free_bytes, gpu.index
