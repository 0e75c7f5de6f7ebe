"""Distil a student in a training loop of your own: kdpipe provides the views, the teacher's outputs and the losses.

Command: uv run python examples/plain_loop.py. Takes about 30 seconds on two CPU cores; no download.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import kdpipe as kd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--run", type=Path, default=Path("runs/plain-loop"))
    options = parser.parse_args()

    # The teacher runs once. From here on only its store is needed.
    train, test = kd.load_dataset("digits", test_share=0.5)
    views = kd.Views(8, ["RandomCrop"])
    teacher = kd.create_model("cnn", train, width=32)
    kd.train_teacher(teacher, train, test=test, views=views, epochs=options.epochs, run=options.run)
    store = kd.cache_teacher(teacher, train, options.run / "store.zarr", views=views, features=["stage2"])

    # Everything below is plain PyTorch.
    student = kd.create_model("cnn", train, width=6)
    loader = kd.DistillationLoader(store, train, batch_size=64)
    with kd.extract_features(student, ["stage2"]) as forward:  # logits and features of the student
        kd_loss, hint = kd.losses.KD(temperature=4), kd.losses.Hint([("stage2", "stage2")], weight=5)
        batch = next(iter(loader))
        hint_loss = hint.module(forward(batch.images), batch.teacher)  # its adapter has parameters
        loader.set_epoch(0)
        optimizer = torch.optim.SGD(
            [*student.parameters(), *hint_loss.parameters()], lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
        for epoch in range(options.epochs):
            for batch in loader:
                output = forward(batch.images)
                loss = 0.1 * F.cross_entropy(output.logits, batch.labels)
                loss = loss + kd_loss(output, batch.teacher) + hint_loss(output, batch.teacher)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    report = kd.evaluate(student, test, normalize=loader.normalize)
    print(f"test accuracy {100 * report.top1:.2f} %")


if __name__ == "__main__":
    main()
