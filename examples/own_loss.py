"""Add a loss of your own, and compare it with KD over three seeds.

Command: uv run python examples/own_loss.py. Takes about a minute on two CPU cores; no download.
In a recipe the same loss is `loss = "python:own_loss:confident_kd"`, with `power` as a key, if this file is in the
current folder.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import kdpipe as kd


@kd.register_loss
def confident_kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, power: float = 1.0
) -> Tensor:
    """KD in which samples count by the teacher's confidence: max(p)^power, with mean 1 over the batch."""
    weights = F.softmax(teacher_logits, dim=1).amax(1) ** power  # [B]
    return weights / weights.mean() * kd.losses.functional.kd_loss(student_logits, teacher_logits, temperature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, default=Path("runs/own-loss"))
    options = parser.parse_args()

    train, test = kd.load_dataset("digits", test_share=0.5)
    views = kd.Views(8, ["RandomCrop"])
    teacher = kd.create_model("cnn", train, width=32)
    kd.train_teacher(teacher, train, test=test, views=views, epochs=options.epochs, batch_size=64, run=options.run)
    store = kd.cache_teacher(teacher, train, options.run / "store.zarr", test=test, views=views)
    settings: dict[str, Any] = {
        "test": test,
        "model_args": {"width": 6},
        "epochs": options.epochs,
        "batch_size": 64,
    }
    variants: dict[str, dict[str, Any]] = {
        "alone": {"views": views},
        "kd": {"store": store, "losses": [kd.losses.KD(temperature=4)]},
        "confident_kd": {"store": store, "losses": [confident_kd(power=2.0)]},
    }
    for name, own in variants.items():
        results = [
            kd.train_student("cnn", train, seed=seed, run=options.run / name, progress=False, **settings, **own)
            for seed in range(options.seeds)
        ]
        accuracies = [100 * result.accuracy for result in results]
        spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        print(f"{name}: {mean(accuracies):.2f}{spread} %")


if __name__ == "__main__":
    main()
