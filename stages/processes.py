"""The processes that torchrun or srun started for one job: which of them this is, and what they agree on.

Each trains on its share of every batch; the first alone writes. With one process nothing here costs anything, so that
there is one code for both. What is agreed on travels over gloo, in tensors on the CPU; what is on GPUs over NCCL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stages.errors import RecipeError, RunError, StoppedEarly
from stages.part import WHOLE, Part, part_from_environment
from stages.watch import Watch
from store import KdpipeError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long the others wait for the first, which evaluates and exports alone. That it ended is noticed at once."""

MEETING = timedelta(minutes=10)
"""How long they wait for each other at the start."""

BUCKET_BYTES = 32 * 2**20
"""How much of the gradients is sent in one piece."""

LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out waiting")
"""What gloo says when another process has ended, in lower case."""


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`, 0 <= rank < count; all methods must be called by all of them, in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any process has it set."""
        if self.count == 1:
            return list(flags)
        everyone = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        return [bool(one) for one in everyone.tolist()]

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Whether any of them was asked to stop, and whether it is time to save, by the first one's clock."""
        stop, due = self.any_of([stop, due and self.first])
        return stop, due

    def check(self, watch: Watch) -> None:
        """Raise StoppedEarly in all of them where one was asked to stop. Call it where everything done is saved."""
        if self.any_of([watch.should_stop()])[0]:
            raise StoppedEarly

    @property
    def part(self) -> Part:
        """This one's part of what they share among themselves otherwise than by batches."""
        return WHOLE if self.count == 1 else Part(self.rank, self.count, "the processes of this job")

    def use(self, device: torch.device) -> None:
        """Have what is on GPUs travel over NCCL, if this `device` is one. Raises RecipeError for unlike devices."""
        if self.count == 1 or device.type in _groups:
            return
        if all(self.any_of([device.type == "cpu", device.type != "cpu"])):
            raise RecipeError(
                f"some of the {self.count} processes compute on a CPU and some on a GPU, process {self.rank} on "
                f"{device.type}: start one for each GPU, or set device = 'cpu'."
            )
        _groups[device.type] = dist.new_group(backend="nccl", timeout=PATIENCE) if device.type == "cuda" else None

    def wait(self) -> None:
        """Until all are here."""
        self.any_of([False])

    def share(self, said: T) -> T:
        """What the first process says, for all: anything that JSON can say."""
        if self.count == 1:
            return said
        text = json.dumps(said).encode() if self.first else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        letters = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        told: T = json.loads(letters.numpy().tobytes())
        return said if self.first else told

    def once(self, work: Callable[[], T]) -> T:
        """What `work`, done by the first process alone, gives, for all: anything that JSON can say.

        The others wait. An error that a user can mend is raised in all, with the exit status that belongs to it.
        """
        if self.count == 1:
            return work()
        if not self.first:
            told: dict[str, Any] = self.share({})
            if "error" in told:
                raise _error_of(*told["error"])
            made: T = told["made"]
            return made
        try:
            made = work()
        except KdpipeError as error:
            self.share({"error": [type(error).__name__, str(error)]})
            raise
        self.share({"made": made})
        return made

    def rows(self, positions: Tensor) -> Tensor:
        """This process's rows of a global batch, int64 [B]: a contiguous share, in rank order."""
        return positions if self.count == 1 else torch.tensor_split(positions, self.count)[self.rank]

    def require_shares(self, batch_size: int, num_samples: int) -> None:
        """Raise RecipeError unless each process has the same share of a batch."""
        if batch_size % self.count or num_samples < self.count:
            raise RecipeError(
                f"train.batch_size is {batch_size}, of {num_samples} samples, and {self.count} processes share each "
                f"batch: give a multiple of {self.count}, such as "
                f"{max(1, round(batch_size / self.count)) * self.count}, or start another number of processes."
            )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make each of `tensors` its mean over the processes, in place: the same bits in all of them."""
        if self.count == 1:
            return
        pending = []
        for bucket in _buckets(tensors):
            flat = torch.cat([one.reshape(-1) for one in bucket])
            pending.append((dist.all_reduce(flat, group=group_of(flat), async_op=True), flat, bucket))
        for sent, flat, bucket in pending:
            sent.wait()
            flat.div_(self.count)
            pieces = torch.split(flat, [one.numel() for one in bucket])
            torch._foreach_copy_(list(bucket), [piece.view_as(one) for piece, one in zip(pieces, bucket, strict=True)])


ONE = Processes()

_groups: dict[str, Any] = {}
"""Over which process group the tensors of a kind of device travel, where that is not the default one."""


def group_of(tensor: Tensor) -> Any:
    """The process group for what is where `tensor` is: NCCL's on GPUs, once `Processes.use` was called."""
    return _groups.get(tensor.device.type)


def processes_of(environ: Mapping[str, str]) -> Processes:
    """The processes that torchrun or srun started together with this one. An element of a Slurm job array is a job of
    its own. Raises RecipeError, naming the variable, for values that do not fit together.
    """
    of_job = {name: value for name, value in environ.items() if not name.startswith("SLURM_ARRAY_")}
    part = part_from_environment(of_job)
    return Processes(part.index, part.count)


def require_one(environ: Mapping[str, str], command: str) -> None:
    """Raise RecipeError where several processes were started for a command that runs in one."""
    count = processes_of(environ).count
    if count > 1:
        raise RecipeError(
            f"{command} runs in one process, and {count} were started: start it without torchrun or srun's tasks, "
            "after train-teacher, cache-teacher and train-student, which share their work among several."
        )


@contextmanager
def joined(environ: Mapping[str, str], should_stop: Callable[[], bool] = lambda: False) -> Iterator[Processes]:
    """Within the block, the processes of `environ` can talk to each other. Enter it before what only one of them may
    fail in, such as a lock or a GPU, for else the others wait for that one; no GPU is looked for here.

    Raises RecipeError where nothing says where they meet, RunError where they do not find each other, or one of them
    ends before its time; where this one was asked to stop as well, that is StoppedEarly.
    """
    own = processes_of(environ)
    if own.count == 1:
        yield own
        return
    _meet(own, environ)
    try:
        yield own
        own.wait()
    except RuntimeError as error:
        if not is_lost(error):
            raise
        if should_stop():
            raise StoppedEarly from error
        raise RunError(
            f"another of the {own.count} processes of this job ended, and process {own.rank} with it: that one says "
            "why. Run the same command again to go on from the last checkpoint."
        ) from error
    finally:
        _groups.clear()
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in LOST)


def _meet(own: Processes, environ: Mapping[str, str]) -> None:
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    place = [environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    if not all(place):
        raise RecipeError(
            f"{own.count} processes train together, and MASTER_ADDR and MASTER_PORT do not say where they meet: set "
            "them in the job script to the first node's name (scontrol show hostnames | head -n 1) and a free port, "
            "or start the processes with torchrun."
        )
    if not (re.fullmatch("[0-9]{1,5}", place[1]) and 0 < int(place[1]) < 65536):
        raise RecipeError(f"MASTER_PORT must be a number from 1 to 65535, not {place[1][:40]!r}: mend the job script.")
    try:
        where = f"env://?rank={own.rank}&world_size={own.count}"
        store, *_ = next(rendezvous(where, timeout=MEETING))
        dist.init_process_group("gloo", store=store, rank=own.rank, world_size=own.count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RunError(
            f"the {own.count} processes of this job did not find each other at {':'.join(place)} ({first_line[:200]}): "
            "check MASTER_ADDR and MASTER_PORT, and that all were started."
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in their order, of one type and up to BUCKET_BYTES at a time."""
    for dtype in dict.fromkeys(one.dtype for one in tensors):
        bucket: list[Tensor] = []
        num_bytes = 0
        for one in tensors:
            if one.dtype is not dtype:
                continue
            if bucket and num_bytes + one.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(one)
            num_bytes += one.nbytes
        yield bucket


def _error_of(name: str, text: str) -> KdpipeError:
    """The error that another process raised, by the name of its class."""
    kinds, waiting = {}, [KdpipeError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.__name__] = kind
        waiting += kind.__subclasses__()
    kind = kinds.get(name, KdpipeError)
    return kind.__new__(kind, text)  # not every class is made from its sentence
