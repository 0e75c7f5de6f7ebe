"""One training step: forward and backward pass of a batch, and the optimizer's step.

Where memory is short the batch is divided into micro-batches whose gradients are accumulated: without batch norm, and
for losses that are means over samples, the sum is the gradient of the whole batch. A step that ran out of memory leaves
no trace: buffers are restored, and the same random numbers are drawn again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from kdpipe.stages.compute.compiled import require_equal_gradients
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import is_builtin
from kdpipe.stages.losses.relations.nce import Memory
from kdpipe.stages.models.hooks import FeatureExtractor
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.collectives import all_reduce_sum
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.memory import is_out_of_memory
from kdpipe.stages.targets.outputs import TopKTargets
from kdpipe.stages.training.checkpoint import Progress, TrainState
from kdpipe.stages.training.job import TrainJob, num_steps_of
from kdpipe.stages.training.optimization.clipping import clip_gradients
from kdpipe.stages.training.optimization.dot import DOT
from kdpipe.stages.training.optimization.gradients import GradientAverage
from kdpipe.stages.training.task import HARD_LABELS, Batch, TrainingTask

UNREADABLE: Any = None
"""In place of the progress where losses are compiled: one that reads it would be compiled again in each epoch."""


class TrainStep:
    """The steps of a job's epoch. It keeps copies of the buffers, for steps that have to be repeated."""

    def __init__(
        self, job: TrainJob, student: FeatureExtractor, state: TrainState, progress: Progress, monitor: RunMonitor
    ) -> None:
        self._job, self._student, self.state, self.progress, self._monitor = job, student, state, progress, monitor
        self._buffers = _Buffers(state.modules)
        groups = state.optimizer.param_groups
        self._parameters = [one for group in groups for one in group["params"] if one.requires_grad]
        in_order_of_use = [one for one in state.modules.parameters() if one.requires_grad]
        self._gradients = GradientAverage(in_order_of_use, job.process_group)
        added = job.task.distillation
        # Compiled, a loss that reads a buffer and then changes it would get gradients by the changed one.
        self._may_join = added is None or (not has_state(added) and all(map(is_builtin, added.configs.values())))
        self._is_checked = False

    def step(self, batch: Batch) -> None:
        """Run one batch forward and backward, step the optimizer, and add the losses to the epoch's sums."""
        batch = replace(batch, images=self.state.settings.place_images(batch.images))
        losses = self._losses_in_memory(batch)
        if self._job.process_group.count > 1:
            losses = self._gradients.finish(losses)
            if isinstance(self.state.optimizer, DOT):
                self.state.optimizer.average(self._job.process_group.count)
            # Each process had its own dropout; the random numbers of an optimizer must be the same in all.
            own = derive_seed(self._job.seed, "optimizer", self.progress.epoch, self.progress.step)
            _seed(own, batch.images.device)
        config, progress = self._job.config, self.progress
        if config.clip_grad is not None:
            self.state.scaler.unscale_(self.state.optimizer)
            clip_gradients(self._parameters, config.clip_grad, config.clip_grad_mode)
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()
        self._job.after_step(self._job.model)
        if self.state.average is not None:
            self.state.average.update(progress.epoch * num_steps_of(self._job) + progress.step)
        sums = progress.sums
        for name, loss in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + loss

    def _losses_in_memory(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the batch, gradients set, with twice as many micro-batches each time memory runs out.

        Several processes do not retry: all would have to do so together, while some wait for others.
        """
        progress, before = self.progress, self.progress.micro_batches
        retries = self._job.process_group.count == 1
        self._buffers.begin_step(copied=retries)
        while True:
            try:
                expected = self._gradients_without_compiler(batch) if self._must_check(batch) else None
                losses = self._forward_backward(batch)
            except (MemoryError, RuntimeError) as error:
                if not (retries and is_out_of_memory(error) and progress.micro_batches < batch.num_samples):
                    raise
            else:
                break
            expected = None
            # Outside of `except`: the error, and with it the tensors of the failed attempt, are freed here.
            self._buffers.restore()
            self.state.optimizer.zero_grad(set_to_none=True)
            self._student.stop_compiling()  # what a CUDA graph has allocated would be lost to the micro-batches
            progress.micro_batches = min(2 * progress.micro_batches, batch.num_samples)
            gc.collect()
            if batch.images.is_cuda:
                torch.cuda.empty_cache()
        if expected is not None:
            self._is_checked = True
            require_equal_gradients(self._named_gradients(), expected, key="train.compile")
        if progress.micro_batches > before:
            warning = micro_batch_warning(self._job.model, self._job.task, batch, progress.micro_batches)
            self._monitor.warn(self._job.stage, warning)
        return losses

    def _must_check(self, batch: Batch) -> bool:
        """Return whether the batch is the first one that is compiled, in float32: others round too differently."""
        is_exact = self.state.settings.precision == "float32"
        return is_exact and not self._is_checked and self._student.compiles and self._is_whole(batch)

    def _is_whole(self, batch: Batch) -> bool:
        return batch.num_samples == min(self._job.config.batch_size, self._job.task.num_samples)

    def _gradients_without_compiler(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gradients of a batch, computed without torch.compile, and leave no trace of that."""
        self._forward_backward(batch, eager=True)
        gradients = {name: gradient.clone() for name, gradient in self._named_gradients().items()}
        self._buffers.restore()
        self._buffers.begin_step(copied=True)
        return gradients

    def _named_gradients(self) -> dict[str, Tensor]:
        named = self.state.modules.named_parameters()
        return {name: one.grad for name, one in named if one.grad is not None}

    def _forward_backward(self, batch: Batch, *, eager: bool = False) -> dict[str, Tensor]:
        job, state, progress = self._job, self.state, self.progress
        own = (job.process_group.rank,) if job.process_group.rank else ()  # rank 0 has the dropout of a single process
        _seed(derive_seed(job.seed, "step", progress.epoch, progress.step, *own), batch.images.device)
        state.optimizer.zero_grad(set_to_none=True)
        if progress.micro_batches == 1:
            with self._gradients.sent_early():
                return self._backward(batch, eager=eager)
        # After one process's job is continued by several, there may be more micro-batches than rows.
        count = min(progress.micro_batches, job.config.batch_size // job.process_group.count)
        whole, sums = all_reduce_sum(batch.num_samples), dict[str, Tensor]()
        for micro_batch in batch.split(count):
            num_samples = all_reduce_sum(micro_batch.num_samples)
            if num_samples == 0:  # of a batch that lacks unreadable images
                continue
            for name, loss in self._backward(micro_batch, num_samples / whole).items():
                sums[name] = sums[name] + loss if name in sums else loss
        return sums

    def _backward(self, batch: Batch, share: float = 1.0, *, eager: bool = False) -> dict[str, Tensor]:
        """Run a batch, or a micro-batch that is `share` of one, forward and backward; returns the losses.

        Compiled are whole batches, and not if `eager`. Of micro-batches the next pass would overwrite the gradients.
        """
        job = self._job
        differentiates_input = job.task.needs_input_gradient
        if differentiates_input:
            batch.images.requires_grad_()
        # Fused attention has no second derivative.
        kernels = sdpa_kernel(SDPBackend.MATH) if differentiates_input else nullcontext()
        with kernels, self.state.settings.active(batch.images.device):
            if self._is_whole(batch) and not eager:
                losses = self._losses(batch)
            else:
                losses = job.task.losses(self._student.eager(batch.images), batch)
        values = torch.stack(list(losses.values()))
        if share != 1:
            values = share * values
        scaler, optimizer = self.state.scaler, self.state.optimizer
        if isinstance(optimizer, DOT) and len(losses) > 1 and next(iter(losses)) == HARD_LABELS:
            scale = scaler.scale(torch.ones((), device=values.device))
            optimizer.hold(scaler.scale(values[0]), scaler.scale(values[1:].sum()), scale)
        scaler.scale(values.sum()).backward()  # type: ignore[no-untyped-call]
        return dict(zip(losses, values.detach().unbind(), strict=True))

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, compiled as one graph with the network where that is compiled and they can be."""
        student, losses = self._student, self._job.task.losses
        if student.joins:
            # Logits of top-k targets are in part computed on the CPU, which has no place in a CUDA graph.
            in_graph = not (batch.images.is_cuda and any(isinstance(one, TopKTargets) for one in batch.teachers))
            with suppress(RecipeError):
                if self._may_join and in_graph:
                    return student.joined(losses, batch.images, replace(batch, progress=UNREADABLE))
            student.joins = False
            self._monitor.warn_once(
                self._job.stage,
                f"train.compile: the network of {self._job.name} is compiled, and its losses are not: one of them "
                "changes from epoch to epoch, keeps a state, is your own, reads top-k targets on a GPU, or is not one "
                "graph.",
            )
        return losses(student(batch.images), batch)


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of the device; `torch.manual_seed` also looks for other devices, slowly."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def micro_batch_warning(model: nn.Module, task: TrainingTask, batch: Batch, micro_batches: int) -> str:
    """Return the warning for batches that are divided, naming what now depends on the micro-batch."""
    batch_size = batch.num_samples
    memory = "GPU memory" if batch.images.is_cuda else "memory"
    warning = (
        f"out of {memory} with batches of {batch_size}: continuing with micro-batches of "
        f"{-(-batch_size // micro_batches)} whose gradients are accumulated; the effective batch size stays "
        f"{batch_size}"
    )
    configs = task.distillation.configs if task.distillation else {}
    affected = [name for name in configs if task.distillation and depends_on_batch(task.distillation.losses[name])]
    modules: list[nn.Module] = [model] + ([task.distillation] if task.distillation else [])
    if any(isinstance(module, _BatchNorm) for one in modules for module in one.modules()):
        affected.append("batch norm")
    return f"{warning}; computed per micro-batch: {', '.join(affected)}." if affected else f"{warning}."


def depends_on_batch(loss: nn.Module) -> bool:
    """Return whether a `WeightedLoss` is not a mean over samples: by what it computes, or by a state such as a memory.

    Batch norm's state is named by itself.
    """
    config: Any = loss.config
    return not config.per_sample or config.samples.needs_probabilities or has_state(loss)


def has_state(loss: nn.Module) -> bool:
    """Return whether losses have buffers besides those of batch norm."""
    norms = {id(buffer) for module in loss.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()}
    return any(id(buffer) not in norms for buffer in loss.buffers())


class _Buffers:
    """Copies of the buffers of a network and its losses before a step; contrastive memories keep only what changed."""

    def __init__(self, modules: nn.Module) -> None:
        self._memories = [module for module in modules.modules() if isinstance(module, Memory)]
        in_memories = {id(memory.rows) for memory in self._memories}
        buffers = [buffer for buffer in modules.buffers() if id(buffer) not in in_memories]
        kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers)
        self._groups = [[one for one in buffers if (one.dtype, one.device) == kind] for kind in kinds]
        self._copies: list[list[Tensor]] = []
        self._sizes: list[torch.Size] = []

    def begin_step(self, *, copied: bool) -> None:
        for memory in self._memories:
            memory.begin_step()
        if not copied:
            return
        sizes = [one.shape for group in self._groups for one in group]
        if sizes != self._sizes:  # range observers resize theirs
            self._copies, self._sizes = [[one.clone() for one in group] for group in self._groups], sizes
            return
        for copies, group in zip(self._copies, self._groups, strict=True):
            torch._foreach_copy_(copies, group)

    def restore(self) -> None:
        for memory in self._memories:
            memory.undo()
        for copies, group in zip(self._copies, self._groups, strict=True):
            _copy_back(copies, group)


@torch.no_grad()
def _copy_back(copies: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
    for copy, buffer in zip(copies, buffers, strict=True):
        buffer.resize_(copy.shape).copy_(copy)
