"""Callbacks that write the metrics of each epoch to files: CSV, and TensorBoard scalars."""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from typing import Any

from kdpipe.pipeline.callbacks.metrics_logger import MetricsLogger, Unavailable, folder_name, scalars_of
from kdpipe.stages.runtime.callbacks import CallbackState
from kdpipe.store import write_atomically

CSV_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"


class CSVLogger(MetricsLogger):
    """Writes metrics.csv into the folder of each training, one line an epoch; a resumed training repeats no line."""

    name = "csv"

    def log(self, state: CallbackState) -> None:
        """Write all epochs so far."""
        rows = [{"epoch": line["epoch"], **scalars_of(line)} for line in state.history]
        columns = dict.fromkeys(name for row in rows for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(state.folder / CSV_FILE, text.getvalue().encode())


class TensorBoardLogger(MetricsLogger):
    """Writes scalars below tensorboard/ in the run folder, a folder for each training, one point an epoch."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, state: CallbackState) -> None:
        """Check that TensorBoard is installed."""
        self._writer = None
        if find_spec("tensorboard") is None:
            raise Unavailable(
                "TensorBoard scalars are not written because the package tensorboard is not installed: run "
                "`uv sync --extra tensorboard` or `pip install 'kdpipe[tensorboard]'`"
            )

    def log(self, state: CallbackState) -> None:
        """Write an epoch."""
        epoch = state.metrics["epoch"]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier process wrote from this epoch on: a resumed training writes it again.
            folder = state.run_dir / TENSORBOARD_FOLDER / folder_name(state.job)
            self._writer = SummaryWriter(str(folder), purge_step=epoch)
        for tag, value in scalars_of(state.metrics).items():
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def finish(self, state: CallbackState) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
