"""Write TensorBoard scalars: accuracy, losses and learning rate of each epoch, by job.

metrics.jsonl has the same figures. The points of a resumed job replace those that were written after its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """Yield a reporter that writes the metrics of epochs below `folder`/tensorboard/JOB/. File errors never raise.

    Without the package tensorboard it warns once and writes nothing.
    """
    if find_spec("tensorboard") is None:
        print_warning(MISSING)
        yield lambda event: None
        return
    boards = _Boards(folder / FOLDER)
    try:
        yield boards.report
    finally:
        boards.close()


class _Boards:
    """One SummaryWriter a job, opened at its first epoch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._has_failed = False

    def report(self, event: ProgressEvent) -> None:
        epoch = event.metrics.get("epoch")
        if not isinstance(epoch, int) or self._has_failed:
            return
        with self._warn_on_error():
            writer = self._writer(event.job, epoch)
            for tag, value in scalars_of(event.metrics).items():
                writer.add_scalar(tag, value, epoch)
            if event.step == event.total:
                self._writers.pop(event.job).close()

    def close(self) -> None:
        for writer in self._writers.values():
            with self._warn_on_error():
                writer.close()

    def _writer(self, job: str, epoch: int) -> Any:
        if job not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier process wrote from this epoch on: a resumed job writes it again.
            self._writers[job] = SummaryWriter(str(self._folder / folder_name(job)), purge_step=epoch)
        return self._writers[job]

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError) as error:
            self._has_failed = True
            print_warning(f"TensorBoard scalars are no longer written ({error}); the job goes on.")


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
