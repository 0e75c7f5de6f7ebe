"""One step of the training loop: a batch forward and back, and the optimizer's step.

Where memory is short the batch goes through in parts, whose gradients are added up: for a network without batch norm,
and losses that are means over samples, that is the gradient of the whole batch. A step that ran out of memory leaves no
trace: buffers are as they were, and the random numbers are drawn anew.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from stages.checkpoint import Machinery, State
from stages.features import Tap
from stages.lesson import Batch, Lesson
from stages.losses.contrast import Memory
from stages.losses.global_batch import total
from stages.machine.memory import is_out_of_memory
from stages.optim import TrainConfig
from stages.order import derive_seed
from stages.processes import Processes
from stages.watch import Watch

if TYPE_CHECKING:
    from stages.training import Job


class Stepper:
    """Takes the steps of a job's epoch. It keeps copies of the buffers, for steps that have to be tried again."""

    def __init__(self, job: Job, student: Tap, machinery: Machinery, state: State, watch: Watch) -> None:
        self._job, self._student, self._machinery, self._state, self._watch = job, student, machinery, state, watch
        self._buffers = _Buffers(machinery.modules)
        groups = machinery.optimizer.param_groups
        self._parameters = [one for group in groups for one in group["params"] if one.requires_grad]

    def step(self, batch: Batch) -> None:
        """One batch forward and back, and one step of the optimizer. Adds the losses to the state's sums."""
        losses = self._in_parts_that_fit(batch)
        if self._job.processes.count > 1:
            losses = _averaged(self._parameters, losses, self._job.processes)
        self._machinery.scaler.step(self._machinery.optimizer)
        self._machinery.scaler.update()
        self._job.after_step(self._job.model)
        sums = self._state.sums
        for name, loss in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + loss

    def _in_parts_that_fit(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the batch, whose gradients are at the parameters; in twice as many parts each time that memory
        runs out. Several processes would have to fall back together, while some wait for others: they do not.
        """
        state, before = self._state, self._state.parts
        retries = self._job.processes.count == 1
        self._buffers.begin_step(copied=retries)
        while True:
            try:
                losses = self._forward_and_back(batch)
            except (MemoryError, RuntimeError) as error:
                if not (retries and is_out_of_memory(error) and state.parts < len(batch.images)):
                    raise
            else:
                break
            # Here the error is gone, and with it the tensors of the failed attempt.
            self._buffers.take_back()
            self._machinery.optimizer.zero_grad(set_to_none=True)
            state.parts = min(2 * state.parts, len(batch.images))
            gc.collect()
            if batch.images.is_cuda:
                torch.cuda.empty_cache()
        if state.parts > before:
            self._watch.warn(self._job.stage, parts_sentence(self._job.model, self._job.lesson, batch, state.parts))
        return losses

    def _forward_and_back(self, batch: Batch) -> dict[str, Tensor]:
        job, machinery, state = self._job, self._machinery, self._state
        own = (job.processes.rank,) if job.processes.rank else ()  # each its own dropout; the first as one alone
        _seed(derive_seed(job.seed, "step", state.epoch, state.step, *own), batch.images.device)
        machinery.optimizer.zero_grad(set_to_none=True)
        if state.parts == 1:
            return self._back(batch)
        # One process's parts may be more than there are rows, where several go on with its job.
        parts = min(state.parts, job.config.batch_size // job.processes.count)
        whole, sums = total(len(batch.images)), dict[str, Tensor]()
        for part in batch.parts(parts):
            num_samples = total(len(part.images))
            if num_samples == 0:  # of a batch that lacks pictures which cannot be read
                continue
            for name, loss in self._back(part, num_samples / whole).items():
                sums[name] = sums[name] + loss if name in sums else loss
        return sums

    def _back(self, batch: Batch, share: float = 1.0) -> dict[str, Tensor]:
        """Forward and back for a batch, or a part that is `share` of one; returns the losses."""
        job, device = self._job, batch.images.device
        narrow = narrow_type(job.config, device)
        twice = job.lesson.needs_input_gradient
        if twice:
            batch.images.requires_grad_()
        # Fused attention has no second derivative.
        kernels = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
        with kernels, torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            losses = job.lesson.losses(self._student(batch.images), batch)
        values = torch.stack(list(losses.values()))
        if share != 1:
            values = share * values
        self._machinery.scaler.scale(values.sum()).backward()  # type: ignore[no-untyped-call]
        return dict(zip(losses, values.detach().unbind(), strict=True))


def _seed(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does; on a CPU without its search for other devices, which takes longer than a small
    network's forward pass.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def narrow_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The narrow type of mixed precision; None where everything runs in float32."""
    if config.precision == "float32" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def parts_sentence(model: nn.Module, lesson: Lesson, batch: Batch, parts: int) -> str:
    """What to tell people of batches that go through in parts."""
    num_samples = len(batch.images)
    what = "GPU memory" if batch.images.is_cuda else "memory"
    said = (
        f"out of {what} with batches of {num_samples}: going on in parts of {-(-num_samples // parts)} whose gradients "
        f"are added up; the effective batch stays {num_samples}"
    )
    configs = lesson.distillation.configs if lesson.distillation else {}
    seen = [name for name, one in configs.items() if not one.per_sample or one.samples.judges]
    modules: list[nn.Module] = [model] + ([lesson.distillation] if lesson.distillation else [])
    if any(isinstance(module, _BatchNorm) for one in modules for module in one.modules()):
        seen.append("batch norm")
    return f"{said}; what goes by the batch ({', '.join(seen)}) now goes by the part." if seen else f"{said}."


def _averaged(parameters: Sequence[nn.Parameter], losses: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Make the gradients their means over the processes, and return the losses' means. A parameter that took part in
    one process takes part in all.
    """
    took_part = processes.any_of([one.grad is not None for one in parameters])
    shared = [one for one, takes_part in zip(parameters, took_part, strict=True) if takes_part]
    for one in shared:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
    values = torch.stack(list(losses.values()))
    processes.average([*(one.grad for one in shared if one.grad is not None), values])
    return dict(zip(losses, values.unbind(), strict=True))


class _Buffers:
    """The buffers of a network and of its losses as they were before a step; large memories keep what they lost."""

    def __init__(self, modules: nn.Module) -> None:
        self._memories = [module for module in modules.modules() if isinstance(module, Memory)]
        kept = {id(memory.rows) for memory in self._memories}
        held = [buffer for buffer in modules.buffers() if id(buffer) not in kept]
        kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in held)
        self._groups = [[one for one in held if (one.dtype, one.device) == kind] for kind in kinds]
        self._copies: list[list[Tensor]] = []
        self._sizes: list[torch.Size] = []

    def begin_step(self, *, copied: bool) -> None:
        for memory in self._memories:
            memory.begin_step()
        if not copied:
            return
        sizes = [one.shape for group in self._groups for one in group]
        if sizes != self._sizes:  # observers of ranges grow theirs
            self._copies, self._sizes = [[one.clone() for one in group] for group in self._groups], sizes
            return
        for copies, group in zip(self._copies, self._groups, strict=True):
            torch._foreach_copy_(copies, group)

    def take_back(self) -> None:
        for memory in self._memories:
            memory.take_back()
        for copies, group in zip(self._copies, self._groups, strict=True):
            _put_back(copies, group)


@torch.no_grad()
def _put_back(copies: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
    for copy, buffer in zip(copies, buffers, strict=True):
        buffer.resize_(copy.shape).copy_(copy)
