"""TensorBoard scalars, for who asks for them: accuracy, losses and learning rate of each epoch, by job.

They come from the events of epochs alone, so metrics.jsonl holds the same; a resumed job's points replace those that
its killed predecessor wrote beyond the checkpoint.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.session.event_log import Reporter
from stages.watch import Event

FOLDER = "tensorboard"
TAGS = {"accuracy": "test/accuracy", "cross_entropy": "test/cross_entropy", "lr": "lr", "wall_s": "epoch_wall_s"}
MISSING = (
    "kdpipe: warning: TensorBoard scalars are not written, as the package tensorboard is not installed: "
    "`uv sync --extra tensorboard`, or `pip install tensorboard`. metrics.jsonl has the same figures."
)


@contextmanager
def scalars(folder: Path) -> Iterator[Reporter]:
    """A reporter that writes the figures of epochs under `folder`/tensorboard/JOB/. Never raises because of files.

    Where the package tensorboard is absent, it says so once and writes nothing.
    """
    if find_spec("tensorboard") is None:
        _warn(MISSING)
        yield lambda event: None
        return
    boards = _Boards(folder / FOLDER)
    try:
        yield boards.report
    finally:
        boards.close()


class _Boards:
    """A writer for each job, opened with its first epoch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._is_broken = False

    def report(self, event: Event) -> None:
        epoch = event.metrics.get("epoch")
        if not isinstance(epoch, int) or self._is_broken:
            return
        with self._forgiving():
            writer = self._writer(event.job, epoch)
            for tag, value in scalars_of(event.metrics).items():
                writer.add_scalar(tag, value, epoch)
            if event.step == event.total:
                self._writers.pop(event.job).close()

    def close(self) -> None:
        for writer in self._writers.values():
            with self._forgiving():
                writer.close()

    def _writer(self, job: str, epoch: int) -> Any:
        if job not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier process wrote from this epoch on is hidden: a resumed job makes these points anew.
            self._writers[job] = SummaryWriter(str(self._folder / folder_name(job)), purge_step=epoch)
        return self._writers[job]

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError) as error:
            self._is_broken = True
            _warn(f"kdpipe: warning: TensorBoard scalars are not written any more ({error}); the job goes on.")


def scalars_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an epoch by their tags; what is absent or no number is left out."""
    found = {tag: metrics.get(name) for name, tag in TAGS.items()}
    losses = metrics.get("losses")
    if isinstance(losses, Mapping):
        found |= {f"loss/{name}": loss for name, loss in losses.items()}
    return {tag: float(value) for tag, value in found.items() if isinstance(value, int | float)}


def folder_name(job: str) -> str:
    """A job's name as a folder's: distilled-student-seed-0."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", job).strip("-.")[:100] or "job"


def _warn(sentence: str) -> None:
    with suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)  # noqa: T201
