"""Distil a student with Hugging Face Accelerate: device, mixed precision and several processes are its business.

Command: uv run --with accelerate python examples/accelerate_loop.py, or `accelerate launch` in place of `python`.
Takes about 30 seconds on two CPU cores; no download.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import kdpipe as kd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--run", type=Path, default=Path("runs/accelerate-loop"))
    options = parser.parse_args()

    accelerator = Accelerator()
    train, test = kd.load_dataset("digits", test_share=0.5)
    views = kd.Views(8, ["RandomCrop"])
    teacher = kd.create_model("cnn", train, width=32)
    with accelerator.main_process_first():  # the others find it done
        kd.train_teacher(teacher, train, test=test, views=views, epochs=options.epochs, run=options.run)
        store = kd.cache_teacher(teacher, train, options.run / "store.zarr", views=views, features=["stage2"])

    student = kd.create_model("cnn", train, width=6)
    # The loader gives each process its rows of every batch: it is not to be prepared again.
    loader = kd.DistillationLoader(store, train, batch_size=64, device=accelerator.device)
    distill = kd.losses.KD(temperature=4)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.epochs * len(loader))
    student, optimizer = accelerator.prepare(student, optimizer)
    for epoch in range(options.epochs):
        for batch in loader:
            logits = student(batch.images)
            loss = 0.1 * F.cross_entropy(logits, batch.labels) + distill(logits, batch.teacher_logits)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    report = kd.evaluate(accelerator.unwrap_model(student), test, normalize=loader.normalize, device=accelerator.device)
    accelerator.print(f"test accuracy {100 * report.top1:.2f} %")


if __name__ == "__main__":
    main()
