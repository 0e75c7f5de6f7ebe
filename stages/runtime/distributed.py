"""The processes of one job, started by torchrun or srun, and communication between them.

Each trains on its share of every batch; only the first writes. With one process all methods return at once, so that the
same code serves both cases. CPU tensors are sent over gloo, GPU tensors over NCCL (`gpu/nccl.py`).
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdpipe.stages.errors import RecipeError, RunError, StoppedEarly
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.nccl import ADVICE, gpu_backend, keep, nccl_groups, require_own_gpus, words_of
from kdpipe.stages.runtime.launcher import ALL, WorkShard, shard_from_env
from kdpipe.store import KdpipeError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""The time that others wait for the first, which evaluates and exports alone; if it ends they notice at once."""

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""The time that processes wait for each other at the start."""

LEAVE_TIMEOUT_S = 10.0
"""The time that a process which fails takes to leave the others, who may never answer."""

LOST_PEER = (
    *("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out waiting"),
    *("ncclremoteerror", "remote process exit"),
)
"""Parts of the messages of gloo and NCCL when another process has ended, in lower case."""


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `count`; all processes must call the methods in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any process has it set."""
        if self.count == 1:
            return list(flags)
        reduced = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return [bool(flag) for flag in reduced.tolist()]

    def sync_flags(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the first process's clock says to save."""
        stop, due = self.any([stop, due and self.is_main])
        return stop, due

    def check_stop(self, monitor: RunMonitor) -> None:
        """Raise StoppedEarly in all processes if one was asked to stop. Call it where all progress is saved."""
        if self.any([monitor.should_stop()])[0]:
            raise StoppedEarly

    @property
    def work_shard(self) -> WorkShard:
        """This process's share of work that is not divided by batches."""
        return ALL if self.count == 1 else WorkShard(self.rank, self.count, "the processes of this job")

    def use_device(self, device: torch.device) -> None:
        """Connect the processes for tensors of a device, and for gradients: GPUs by NCCL, unless BACKEND says gloo.

        Raises:
            RecipeError: Only some processes use GPUs, or two the same one.
            RunError: The connection failed; all processes say in which one.
        """
        if self.count == 1:
            return
        if _groups.get(WORLD) is not dist.group.WORLD:  # connected again, by the caller of the Python API
            _groups.clear()
            _groups[WORLD] = dist.group.WORLD
        if device.type in _groups:
            return
        if all(self.any([device.type == "cpu", device.type != "cpu"])):
            raise RecipeError(
                f"some of the {self.count} processes use a CPU and some a GPU (process {self.rank}: {device.type}): "
                "start one for each GPU, or set device = 'cpu'."
            )
        if device.type == "cpu" or gpu_backend(os.environ) == "gloo":
            _groups.update({device.type: None, GRADIENTS: dist.new_group(backend="gloo", timeout=TIMEOUT)})
            return
        require_own_gpus(device)
        _groups[device.type], _groups[GRADIENTS] = nccl_groups(device, 2)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any([False])

    def broadcast_object(self, value: T) -> T:
        """Return the first process's value, which must be JSON, in all."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        data = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(data, 0)
        received: T = json.loads(data.numpy().tobytes())
        return value if self.is_main else received

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only, and return its result, which must be JSON, in all.

        The others wait. A KdpipeError is raised in all, with its class and thus its exit code.
        """
        if self.count == 1:
            return work()
        if not self.is_main:
            received: dict[str, Any] = self.broadcast_object({})
            if "error" in received:
                raise _error_of(*received["error"])
            return received["result"]  # type: ignore[no-any-return]
        try:
            result = work()
        except KdpipeError as error:
            self.broadcast_object({"error": [type(error).__name__, str(error)]})
            raise
        self.broadcast_object({"result": result})
        return result

    def rows(self, positions: Tensor) -> Tensor:
        """Return this process's contiguous share of a global batch, int64 [B], in rank order."""
        return positions if self.count == 1 else torch.tensor_split(positions, self.count)[self.rank]

    def require_shares(self, batch_size: int, num_samples: int) -> None:
        """Raise RecipeError unless the processes can share a batch equally."""
        if batch_size % self.count or num_samples < self.count:
            raise RecipeError(
                f"train.batch_size is {batch_size}, of {num_samples} samples, and {self.count} processes share each "
                f"batch: set a multiple of {self.count}, such as "
                f"{max(1, round(batch_size / self.count)) * self.count}, or start another number of processes."
            )


SINGLE = ProcessGroup()

GRADIENTS, WORLD = "gradients", "world"

_groups: dict[str, Any] = {}
"""The process groups for the tensors of a type of device, None for the default one; that of gradients, and of all.

Gradients have a group of their own, as they are sent while other collectives of the backward pass go on: a process that
lacks a gradient sends it later than others do, and within one group the order must be the same in all.
"""


def torch_group_of(tensor: Tensor) -> Any:
    """Return the process group for a tensor's device: NCCL's on GPUs, after `ProcessGroup.use_device`."""
    return _groups.get(tensor.device.type)


def gradient_group() -> Any:
    """Return the process group for gradients, after `ProcessGroup.use_device`."""
    return _groups.get(GRADIENTS)


def group_from_env(environ: Mapping[str, str]) -> ProcessGroup:
    """Return the processes that torchrun or srun started together with this one.

    Each element of a Slurm job array is a separate job. Raises RecipeError, naming the variable, for invalid values.
    """
    shard = shard_from_env({name: value for name, value in environ.items() if not name.startswith("SLURM_ARRAY_")})
    return ProcessGroup(shard.index, shard.count)


def require_single_process(environ: Mapping[str, str], command: str) -> None:
    """Raise RecipeError if several processes were started for a command that runs in one."""
    count = group_from_env(environ).count
    if count > 1:
        raise RecipeError(
            f"{command} runs in one process, and {count} were started: start it without torchrun or srun's tasks; "
            "only train-teacher, cache-teacher and train-student use several."
        )


@contextmanager
def init_distributed(
    environ: Mapping[str, str], should_stop: Callable[[], bool] = lambda: False
) -> Iterator[ProcessGroup]:
    """Connect the processes of `environ` within the block.

    Enter it before anything in which a single process may fail, such as a lock or a GPU, else the others wait for it;
    no GPU is used here.

    Raises:
        RecipeError: There is no address to meet at.
        RunError: The processes do not find each other, or one of them ended early.
        StoppedEarly: One of them ended early, and this one was asked to stop as well.
    """
    own = group_from_env(environ)
    if own.count == 1:
        yield own
        return
    _connect(own, environ)
    failed = True
    try:
        yield own
        own.barrier()
        failed = False
    except RuntimeError as error:
        if is_lost_peer(error) and should_stop():
            raise StoppedEarly from error
        if is_lost_peer(error):
            raise RunError(
                f"another of the {own.count} processes of this job ended, and process {own.rank} with it: see its "
                "message. Run the same command again to continue from the last checkpoint."
            ) from error
        if isinstance(error, dist.DistBackendError):
            raise RunError(
                f"the connection between the GPUs failed in process {own.rank} of {own.count} ({words_of(error)}): "
                f"{ADVICE}"
            ) from error
        raise
    finally:
        _leave(failed=failed)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error means that another process has ended."""
    text = str(error).lower()
    from_store = isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)
    return from_store or any(words in text for words in LOST_PEER)


def _leave(*, failed: bool) -> None:
    """Disconnect this process. After a failure nothing is waited for: what others were to send may never come."""
    groups = [group for name, group in _groups.items() if group is not None and name != WORLD]
    _groups.clear()
    if not failed:
        dist.destroy_process_group()
        return
    for group in groups:  # with gradients that are still being sent
        keep(group)

    def leave() -> None:
        for group in groups:
            with suppress(Exception):  # not every backend can
                group.abort()
        with suppress(Exception):
            dist.destroy_process_group()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(LEAVE_TIMEOUT_S)


def _connect(own: ProcessGroup, environ: Mapping[str, str]) -> None:
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    address = [environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    if not all(address):
        raise RecipeError(
            f"{own.count} processes train together, and MASTER_ADDR and MASTER_PORT are not set: set "
            "them in the job script to the first node's name (scontrol show hostnames | head -n 1) and a free port, "
            "or start the processes with torchrun."
        )
    if not (re.fullmatch("[0-9]{1,5}", address[1]) and 0 < int(address[1]) < 65536):
        raise RecipeError(f"MASTER_PORT must be a number from 1 to 65535, not {address[1][:40]!r}: fix the job script.")
    try:
        where = f"env://?rank={own.rank}&world_size={own.count}"
        store, *_ = next(rendezvous(where, timeout=RENDEZVOUS_TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=own.rank, world_size=own.count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RunError(
            f"the {own.count} processes of this job did not find each other at {':'.join(address)} "
            f"({first_line[:200]}): check MASTER_ADDR and MASTER_PORT, and that all of them were started."
        ) from error


def _error_of(name: str, text: str) -> KdpipeError:
    """Return the error that another process raised, by the name of its class."""
    classes = [KdpipeError]
    for kind in classes:
        classes += kind.__subclasses__()
    kind = next((kind for kind in classes if kind.__name__ == name), KdpipeError)
    return kind.__new__(kind, text)  # constructors of some classes take other arguments
