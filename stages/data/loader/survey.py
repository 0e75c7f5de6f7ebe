"""Samples of a torch Dataset that stay there: read once in workers for labels and checksums, then on access."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from kdpipe.stages.data.decode import DecodeSpec, Pixels, quiet_pillow
from kdpipe.stages.data.image_files import ImageFiles, pixel_checksum
from kdpipe.stages.data.image_source import NO_STAMP, ImageSource, Stamp
from kdpipe.stages.data.loader.workers import signals_blocked, worker_options
from kdpipe.stages.data.splits import Indices
from kdpipe.stages.errors import DataError
from kdpipe.stages.runtime.cpu import num_cores

ReadSample = Callable[[int], tuple[Pixels, Any]]
"""Returns a sample's pixels, uint8 [C, H, W], and its label, a number or [K], by its position. Raises DataError."""

CHUNK = 64
"""Samples that a worker reads for one answer."""


@dataclass(frozen=True, eq=False)
class DatasetItems(ImageSource):
    """Samples at `positions`, int64 [N], of a torch Dataset that `name` names in messages."""

    read: ReadSample
    name: str
    positions: Indices

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Indices) -> Self:
        return type(self)(self.read, self.name, self.positions[indices])

    def where(self, index: int) -> str:
        return f"{self.name}, sample {self.positions[index]}"

    def stamp(self, index: int) -> Stamp:
        return NO_STAMP

    def decode(self, index: int, spec: DecodeSpec) -> Pixels:
        return self.read(int(self.positions[index]))[0]


def survey(
    read: ReadSample,
    name: str,
    num_samples: int,
    *,
    num_workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[ImageFiles, npt.NDArray[Any]]:
    """Return the images of a Dataset, to be read on access, and the labels, [N] or [N, K].

    Args:
        read: Reads a sample.
        name: Names the Dataset in messages.
        num_samples: N.
        num_workers: Worker processes; None means one for each available core.
        on_image: Called with (done, N) from time to time; may raise to abort.

    Raises:
        DataError: A sample cannot be read, or has another number of channels than the first.
    """
    workers = num_cores() if num_workers is None else num_workers
    loader: DataLoader[Any] = DataLoader(_Chunks(read, num_samples), batch_size=None, **worker_options(workers))
    with signals_blocked():
        answers = iter(loader)
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]] = []
    for answer in answers:
        if isinstance(answer, str):
            raise DataError(answer)
        found.append(answer)
        if on_image is not None:
            on_image(min(len(found) * CHUNK, num_samples), num_samples)
    rows, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    checksums, channels, *shape = rows.T
    if len(others := np.flatnonzero(channels != channels[0])):
        raise DataError(
            f"{name}: image 0 has {channels[0]} channels, image {others[0]} has {channels[others[0]]}: give channels = "
            "1 or 3 to convert them (in Python: kdpipe.as_image_set(dataset, channels=3))."
        )
    items = DatasetItems(read, name, np.arange(num_samples, dtype=np.int64))
    shapes = np.ascontiguousarray(np.stack(shape, axis=1), dtype=np.int32)
    spec = DecodeSpec(int(channels[0]))
    return ImageFiles(items, spec, checksums.astype(np.uint32), shapes), labels


class _Chunks(Dataset[Any]):
    """Reads CHUNK samples: checksum, channels, height and width, int64 [n, 4], and labels [n, ...]; or says why not."""

    def __init__(self, read: ReadSample, num_samples: int) -> None:
        self._read, self._num_samples = read, num_samples

    def __len__(self) -> int:
        return (self._num_samples + CHUNK - 1) // CHUNK

    def __getitem__(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]] | str:
        rows, labels = [], []
        try:
            with quiet_pillow():
                for index in range(number * CHUNK, min((number + 1) * CHUNK, self._num_samples)):
                    pixels, label = self._read(index)
                    rows.append((pixel_checksum(pixels), *pixels.shape))
                    labels.append(label)
        except DataError as error:  # would arrive as a traceback
            return str(error)
        return np.array(rows, dtype=np.int64), np.array(labels)
