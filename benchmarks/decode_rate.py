"""Compare images/s of kdpipe's loader with those of torchvision's ImageFolder and timm's ImageDataset in a DataLoader.

    uv run python benchmarks/decode_rate.py [--images N] [--rounds N] [--workers N]

JPEGs of 500 x 375 pixels, RandomResizedCrop to 224 and flip, in batches of 64, in as many worker processes each. All
end with a batch of uint8 images in the main process; they alternate in one process, and medians are printed. kdpipe
reads the same images from a folder, and from a tar file (`webdataset:PATH`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdpipe.stages.compute.threads import set_up_threads
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import Renderer

BATCH_SIZE, SIZE = 64, 224

OPERATIONS = ({"name": "RandomResizedCrop", "size": SIZE}, {"name": "RandomHorizontalFlip"})

Epoch = Callable[[], Iterator[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    disable_malloc_trim()  # as the command line does
    set_up_threads(None)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = place
        write(folder, arguments.images)
        epochs = {
            "kdpipe, imagefolder": kdpipe(f"imagefolder:{folder / 'photos'}", arguments.workers),
            "kdpipe, webdataset": kdpipe(f"webdataset:{folder / 'photos.tar'}", arguments.workers),
            "torchvision's ImageFolder": torchvision(folder / "photos", arguments.workers),
            "timm's ImageDataset": timm(folder / "photos", arguments.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        for number in range(arguments.rounds + 1):
            for name, epoch in epochs.items():
                measured = rate(epoch)
                if number:  # the first round starts the workers
                    rates[name].append(measured)
    print(f"{arguments.images} JPEGs of 500 x 375 cropped to {SIZE}, {arguments.workers} workers")
    own = rates["kdpipe, imagefolder"]
    for name, found in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(own, found, strict=True))
        print(f"  {name:28}{statistics.median(found):8,.0f} images/s   kdpipe's folder is {ratio:.2f} times as fast")


def write(folder: Path, num_images: int) -> None:
    """Write photographs of colored shapes and noise, and a tar file of the same."""
    generator = np.random.default_rng(0)
    (folder / "photos" / "a").mkdir(parents=True)
    for number in range(num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        noise = generator.integers(0, 24, (375, 500, 3), dtype=np.uint8)
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) // 10 * 9 + noise
        Image.fromarray(pixels).save(folder / "photos" / "a" / f"{number}.jpg", quality=90)
        (folder / "photos" / "a" / f"{number}.cls").write_text("0")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for file in sorted((folder / "photos" / "a").iterdir()):
            tar.add(file, f"a/{file.name}")
    for file in (folder / "photos" / "a").glob("*.cls"):
        file.unlink()


def kdpipe(name: str, num_workers: int) -> Epoch:
    train = load_dataset(DataConfig(name=name, cache_bytes=0, test_share=1e-9), "train")
    renderer = Renderer(Views(engine="transforms", operations=OPERATIONS), 3, None)
    loader = ImageLoader(train, torch.device("cpu"), renderer, num_workers=num_workers)
    view = 0

    def epoch() -> Iterator[Any]:
        nonlocal view
        view += 1
        requests = (ViewRequest(indices, view) for indices in torch.randperm(len(train)).split(BATCH_SIZE))
        return map(attrgetter("images"), loader.stream(requests))

    return epoch


def torchvision(folder: Path, num_workers: int) -> Epoch:
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    dataset = ImageFolder(str(folder), transform)
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "shuffle": True}
    loader: DataLoader[Any] = DataLoader(dataset, BATCH_SIZE, **workers)
    return lambda: (images for images, _ in loader)


def timm(folder: Path, num_workers: int) -> Epoch:
    transform = create_transform(
        SIZE, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
    )
    dataset = ImageDataset(str(folder), transform=transform)
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "shuffle": True}
    loader: DataLoader[Any] = DataLoader(dataset, BATCH_SIZE, collate_fn=fast_collate, **workers)
    return lambda: (images for images, _ in loader)


def rate(epoch: Epoch) -> float:
    begin, count = time.perf_counter(), 0
    for images in epoch():
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIZE, SIZE)
        count += len(images)
    return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
