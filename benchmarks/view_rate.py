"""Compare images/s of kdpipe's tensor engine and torchvision's v2 transforms in a DataLoader.

    uv run python benchmarks/view_rate.py [--rounds N]

Random crop with padding 4 and flip of 32x32 RGB images, in batches of 256. The baseline is the usual loop: a
DataLoader with two persistent worker processes, v2.RandomCrop and v2.RandomHorizontalFlip for each sample. Both end
with a batch of uint8 images in the main process; they alternate in one process, and medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from operator import attrgetter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdpipe.stages.compute.threads import max_threads, set_up_threads
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import Renderer

NUM_IMAGES, BATCH_SIZE, NUM_WORKERS = 50_000, 256, 2

OPERATIONS = ({"name": "RandomCrop", "padding": 4}, {"name": "RandomHorizontalFlip"})


class OneByOne(Dataset[Tensor]):
    """A data set that applies torchvision's transforms to each image."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        view: Tensor = self.transform(self.images[index])
        return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    disable_malloc_trim()  # both as the command line does
    set_up_threads(None)
    images = torch.randint(256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8)
    ours, baseline = tensor_engine(images), one_by_one(images)
    rates: dict[str, list[float]] = {"ours": [], "baseline": []}
    for number in range(rounds + 1):
        for name, epoch in (("ours", ours), ("baseline", baseline)):
            found = rate(epoch)
            if number:  # the first round warms up workers and memory
                rates[name].append(found)
    ratios = [own / other for own, other in zip(rates["ours"], rates["baseline"], strict=True)]
    print(f"crop and flip at 32x32, batches of {BATCH_SIZE}, up to {max_threads()} CPU threads")
    print(f"  tensor engine                        {statistics.median(rates['ours']):11,.0f} images/s")
    print(f"  torchvision v2, {NUM_WORKERS} DataLoader workers  {statistics.median(rates['baseline']):11,.0f} images/s")
    print(f"  ratio {statistics.median(ratios):.1f}")


def tensor_engine(images: Tensor) -> Callable[[], Iterator[Tensor]]:
    labels, ids = torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))
    image_set = ImageSet("random", "train", images, labels, ids, ("0",))
    loader = ImageLoader(image_set, torch.device("cpu"), Renderer(Views(operations=OPERATIONS), 3, (32, 32)))
    view = 0

    def epoch() -> Iterator[Tensor]:
        nonlocal view
        view += 1
        requests = (ViewRequest(indices, view) for indices in torch.randperm(len(images)).split(BATCH_SIZE))
        return map(attrgetter("images"), loader.stream(requests))

    return epoch


def one_by_one(images: Tensor) -> Callable[[], Iterator[Tensor]]:
    loader = DataLoader(
        OneByOne(images), batch_size=BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, persistent_workers=True
    )
    return lambda: iter(loader)


def rate(epoch: Callable[[], Iterator[Tensor]]) -> float:
    started = time.perf_counter()
    num_images = 0
    for batch in epoch():
        num_images += len(batch)
        del batch  # frees its memory for the next batch
    return num_images / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
