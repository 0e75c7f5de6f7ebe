"""Write TensorBoard scalars: accuracy, losses and learning rate of each epoch, by job.

metrics.jsonl has the same figures. The points of a resumed job replace those that were written after its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdpipe.pipeline.terminal.output import print_warning
from kdpipe.pipeline.terminal.reporter import Reporter
from kdpipe.stages.runtime.events import ProgressEvent

FOLDER = "tensorboard"
TAGS = {"accuracy": "test/accuracy", "cross_entropy": "test/cross_entropy", "lr": "lr", "wall_s": "epoch_wall_s"}
MISSING = (
    "TensorBoard scalars are not written because the package tensorboard is not installed: "
    "run `uv sync --extra tensorboard` or `pip install tensorboard`. metrics.jsonl has the same figures."
)


@contextmanager
def scalars(folder: Path) -> Iterator[Reporter]:
    """Yield a reporter that writes the metrics of epochs below `folder`/tensorboard/JOB/.

    File errors, and the lack of the package tensorboard, are one warning; the job goes on.
    """
    writers: dict[str, Any] = {}
    is_on = find_spec("tensorboard") is not None
    if not is_on:
        print_warning(MISSING)

    def report(event: ProgressEvent) -> None:
        nonlocal is_on
        epoch = event.metrics.get("epoch")
        if is_on and isinstance(epoch, int):
            try:
                _write(writers, folder / FOLDER / folder_name(event.job), event, epoch)
            except (OSError, ImportError) as error:
                is_on = False
                print_warning(f"TensorBoard scalars are no longer written ({error}); the job goes on.")

    try:
        yield report
    finally:
        for writer in writers.values():
            with suppress(OSError):
                writer.close()


def _write(writers: dict[str, Any], folder: Path, event: ProgressEvent, epoch: int) -> None:
    """Write an epoch with the writer of its job, which is created at the first epoch and closed at the last."""
    if event.job not in writers:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier process wrote from this epoch on: a resumed job writes it again.
        writers[event.job] = SummaryWriter(str(folder), purge_step=epoch)
    for tag, value in scalars_of(event.metrics).items():
        writers[event.job].add_scalar(tag, value, epoch)
    if event.step == event.total:
        writers.pop(event.job).close()


def scalars_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the metrics of an epoch, by tag."""
    found = {tag: metrics.get(name) for name, tag in TAGS.items()}
    losses = metrics.get("losses")
    if isinstance(losses, Mapping):
        found |= {f"loss/{name}": loss for name, loss in losses.items()}
    return {tag: float(value) for tag, value in found.items() if isinstance(value, int | float)}


def folder_name(job: str) -> str:
    """Return a folder name for a job, such as distilled-student-seed-0."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", job).strip("-.")[:100] or "job"
