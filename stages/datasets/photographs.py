"""The image files of one split's folder, before any is decoded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from stages.datasets.paths import Paths
from stages.datasets.pixels import Form
from stages.datasets.split import Rows


@dataclass(frozen=True, eq=False)
class Photographs:
    """N files below `folder`, of the data set `name`, to be decoded to `form`; `sample_ids` int64 [N]."""

    name: str
    folder: Path
    paths: Paths
    sample_ids: Rows
    form: Form

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Rows) -> Photographs:
        """Those at `rows`, int64 [M], in that order."""
        return dataclasses.replace(self, paths=self.paths.take(rows), sample_ids=self.sample_ids[rows])
