"""Write a folder of made-up photos, and train a teacher on them: a plain torchvision network, saved as anyone saves it.

python examples/shapes.py photos teacher.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize

CLASSES = ("circle", "square", "triangle")
SIZE = 96
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def draw(name: str, generator: np.random.Generator) -> Image.Image:
    """Draw a shape of any size, in shades of its class's color, on a noisy background."""
    image = Image.fromarray(generator.integers(0, 110, (SIZE, SIZE, 3), dtype=np.uint8))
    radius = int(generator.integers(12, 30))
    x, y = (int(generator.integers(radius, SIZE - radius)) for _ in range(2))
    color = generator.integers(40, 130, 3)
    color[CLASSES.index(name)] += 125
    box, pen = (x - radius, y - radius, x + radius, y + radius), ImageDraw.Draw(image)
    if name == "circle":
        pen.ellipse(box, fill=tuple(color.tolist()))
    elif name == "square":
        pen.rectangle(box, fill=tuple(color.tolist()))
    else:
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=tuple(color.tolist()))
    return image


def write_photos(folder: Path, counts: dict[str, int]) -> None:
    """Write FOLDER/train/CLASS/NUMBER.jpg and FOLDER/test/CLASS/NUMBER.jpg."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(name, generator).save(folder / split / name / f"{number}.jpg", quality=90)


def train_teacher(folder: Path, file: Path, epochs: int) -> None:
    """Train a ResNet-18 on the training photos at 64 x 64 pixels, and save its state dict."""
    torch.manual_seed(0)
    model = resnet18(num_classes=len(CLASSES))
    paths = sorted((folder / "train").glob("*/*.jpg"))
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    pixels = np.stack([np.asarray(Image.open(path).resize((64, 64))) for path in paths])
    images = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, MEAN, STD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), 12):
            loss = cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        print(f"teacher, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    torch.save(model.state_dict(), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--train", type=int, default=200, help="training photos of each class")
    parser.add_argument("--test", type=int, default=100, help="test photos of each class")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    write_photos(options.photos, {"train": options.train, "test": options.test})
    train_teacher(options.photos, options.teacher, options.epochs)
