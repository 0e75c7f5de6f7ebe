"""Gradients averaged over the processes of a job, each sent while the backward pass computes those of earlier layers.

A bucket of gradients is sent when all of them are there, and those of the buckets before it: so all processes send the
same buckets in the same order, also where one lacks some gradients, whose buckets it sends after the backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.runtime.distributed import ProcessGroup, gradient_group

BUCKET_BYTES = 4 * 2**20
"""The largest size of gradients that are sent at once: several in a network's backward pass."""


class GradientAverage:
    """The average over the processes of the gradients of `parameters`, which are in the order of their use."""

    def __init__(self, parameters: Sequence[nn.Parameter], process_group: ProcessGroup) -> None:
        self._parameters, self._process_group = parameters, process_group
        self._buckets = list(_buckets(parameters[::-1])) if process_group.count > 1 else []
        self._bucket_of = {id(one): index for index, bucket in enumerate(self._buckets) for one in bucket}
        self._missing: list[set[int]] = []
        self._sent: list[tuple[Any, Tensor]] = []
        # The parameters outlive this object, and must not keep it.
        counted = weakref.WeakMethod(self._count)
        handles = [
            one.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda one: (count := counted()) and count(one)
            )
            for bucket in self._buckets
            for one in bucket
        ]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    @contextmanager
    def sent_early(self) -> Iterator[None]:
        """Send gradients as soon as they are there; the block runs the last backward pass before `finish`."""
        self._missing = [{id(one) for one in bucket} for bucket in self._buckets]
        try:
            yield
        finally:
            self._missing = []

    def finish(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Send the remaining gradients, and put averages in place of all; returns the averages of `losses`.

        A parameter that has a gradient in one process counts as used in all. All get the same bits.
        """
        if self._process_group.count == 1:
            return losses
        while len(self._sent) < len(self._buckets):
            self._send()
        values = torch.stack(list(losses.values()))
        sent = dist.all_reduce(values, group=gradient_group(), async_op=True)
        used = self._process_group.any([one.grad is not None for one in self._parameters])
        for one, is_used in zip(self._parameters, used, strict=True):
            if is_used and one.grad is None:
                one.grad = torch.zeros_like(one)
        for (work, flat), bucket in zip(self._sent, self._buckets, strict=True):
            work.wait()
            self._put_back(flat.div_(self._process_group.count), bucket)
        self._sent = []
        sent.wait()
        return dict(zip(losses, (values / self._process_group.count).unbind(), strict=True))

    def _count(self, parameter: Tensor) -> None:
        """Note that a parameter has its gradient, and send what is complete."""
        if not self._missing:
            return
        index = self._bucket_of[id(parameter)]
        if index < len(self._sent):
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} got a gradient twice in one backward pass, the second "
                "after several processes had averaged it: use torch's checkpoints with use_reentrant=False, or train "
                "in one process."
            )
        self._missing[index].discard(id(parameter))
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append((dist.all_reduce(flat, group=gradient_group(), async_op=True), flat))

    @staticmethod
    def _put_back(flat: Tensor, bucket: Sequence[nn.Parameter]) -> None:
        pieces = torch.split(flat, [one.numel() for one in bucket])
        pairs = [
            (one.grad, piece.view_as(one)) for one, piece in zip(bucket, pieces, strict=True) if one.grad is not None
        ]
        if pairs:
            torch._foreach_copy_([grad for grad, _ in pairs], [piece for _, piece in pairs])


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield `parameters` in order, of one type and up to BUCKET_BYTES at a time."""
    for dtype in dict.fromkeys(one.dtype for one in parameters):
        bucket: list[nn.Parameter] = []
        for one in (one for one in parameters if one.dtype is dtype):
            if bucket and sum(waiting.nbytes for waiting in bucket) + one.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(one)
        yield bucket
