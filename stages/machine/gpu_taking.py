"""Taking a GPU: the freest that nobody uses, or the one that is named; by a claim, so that two jobs take two."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.machine.gpu_claims import CLAIMS, Claimant, claim_gpu, launcher, release_gpu
from stages.machine.gpu_users import user_of
from stages.machine.gpus import Gpu
from stages.machine.visible_gpus import ORDER, VISIBLE, number_in, visible_gpus
from stages.part import local_rank
from store import LockedError

ADVICE = "wait for it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."


@dataclass(frozen=True)
class GpuTaking:
    """The choice of a GPU among `gpus`, by what `environ` says; `claims` is the folder of the claims on them."""

    gpus: Sequence[Gpu]
    environ: MutableMapping[str, str]
    share: bool
    warn: Callable[[str], None]
    claims: Path = CLAIMS

    def take(self, name: str) -> None:
        """Claim the GPU that `choose_device` will give for `name`, and see to it that it does. Raises LockedError."""
        if not self.gpus:
            return
        self.environ.setdefault(ORDER, "PCI_BUS_ID")
        number = number_in(name)
        if VISIBLE not in self.environ and number is None:
            self.environ[VISIBLE] = self._freest().uuid
            return
        seen = visible_gpus(self.gpus, self.environ)
        place = self._rank % max(1, len(seen)) if number is None else number
        if place < len(seen) and (gpu := seen[place]) is not None:
            self._take_this(gpu)

    def undo(self) -> None:
        """Give up GPUs that are there and that torch cannot use."""
        seen = visible_gpus(self.gpus, self.environ)
        if seen:
            self.warn(f"torch can use none of {len(seen)} GPUs, perhaps for want of a newer driver: on the CPU, then.")
        for gpu in self.gpus:
            release_gpu(gpu.uuid, self.claims)

    @property
    def _rank(self) -> int:
        return local_rank(self.environ) or 0

    def _user_of(self, gpu: Gpu) -> str | None:
        return user_of(gpu, launcher(self.environ) is not None)

    def _claim(self, gpu: Gpu) -> Claimant | None:
        return claim_gpu(gpu.uuid, self.environ, self.claims)

    def _take_this(self, gpu: Gpu) -> None:
        claimant = self._claim(gpu)
        if claimant is not None and claimant.is_sibling:
            return
        # The driver's word first: it knows what a process takes of the GPU.
        user = self._user_of(gpu) or (None if claimant is None else str(claimant.holder))
        if user is None:
            return
        if not self.share:
            release_gpu(gpu.uuid, self.claims)
            raise LockedError(f"{gpu} is in use by {user}: {ADVICE}")
        self._say_shared(gpu, user)

    def _freest(self) -> Gpu:
        """The idle GPU with the most free memory that nobody has claimed, now claimed; else a sibling's; else, where
        that is wanted, one that others use.
        """
        users = {gpu.uuid: self._user_of(gpu) for gpu in self.gpus}
        ranked = sorted(self.gpus, key=_by_free_memory)
        idle, busy = ([gpu for gpu in ranked if (users[gpu.uuid] is None) is is_idle] for is_idle in (True, False))
        # Each process of a job begins with another one: without claims, too, they rarely meet.
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
            return sorted(siblings, key=_by_index)[self._rank % len(siblings)]
        best = next(gpu for gpu in [*idle, *busy])
        return self._shared(best, str(users[best.uuid]))

    def _shared(self, gpu: Gpu, user: str) -> Gpu:
        if not self.share:
            others = f"all {len(self.gpus)} GPUs are in use; the freest, " if len(self.gpus) > 1 else ""
            raise LockedError(f"{others}{gpu} is in use by {user}: {ADVICE}")
        self._claim(gpu)  # for when its user is gone
        self._say_shared(gpu, user)
        return gpu

    def _say_shared(self, gpu: Gpu, user: str) -> None:
        self.warn(f"{gpu} is shared with {user}: both are slower for it, and may run out of its memory.")


def _by_free_memory(gpu: Gpu) -> tuple[int, int]:
    return -gpu.free_bytes, gpu.index


def _by_index(gpu: Gpu) -> tuple[int, str]:
    return gpu.index, gpu.uuid
