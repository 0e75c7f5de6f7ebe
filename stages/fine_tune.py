"""The fine-tuning of a compressed student: the one training loop, from where the compression left the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.compression.sparsity import apply_masks
from stages.job_folder import JobFolder
from stages.lesson import Lesson
from stages.losses.terms import student_layers
from stages.network import Network
from stages.optim import TrainConfig
from stages.setup import Setup, deciding
from stages.teaching import Teaching
from stages.train_student import StudentConfig, build_lesson
from stages.training import Job, train


@dataclass(frozen=True)
class Tutor:
    """Who teaches a student while it is compressed: the stores, or nobody but the hard labels.

    root: the folder in which its networks are. teaching: None for hard labels alone, as what distillation is compared
    with has it.
    """

    student: StudentConfig
    seed: int
    teaching: Teaching | None
    setup: Setup
    root: Path

    @property
    def handed_out(self) -> bool:
        """Whether its networks are for use, as ONNX files: what hard labels alone made is there to be compared with."""
        return self.teaching is not None

    def folder(self, kind: str) -> JobFolder:
        """Where this seed's network of a kind is, such as `pruned`."""
        return JobFolder(self.root / f"{kind}-seed{self.seed}")

    def made_from(self, how: Mapping[str, Any], starts_from: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
        """What decides a fine-tuning's result: how it is compressed, where it starts, and all that it is taught."""
        smoothing = self.student.label_smoothing if self.teaching is None else 0.0
        return {
            **how,
            "starts_from": starts_from,
            "train": deciding(config),
            "seed": self.seed,
            "data": self.setup.data_identity(),
            "test": self.setup.test_identity(),
            "views": self.setup.shown_views(),
            **({"label_smoothing": smoothing} if smoothing else {}),
            "teaching": self.teaching.to_json() if self.teaching else None,
        }

    def lesson(self, network: Network) -> Lesson:
        """What a network learns from: the adapters of losses on features meet its widths as they are, and ramps have
        ended. Raises what `build_lesson` raises.
        """
        teaching = self.teaching.main if self.teaching else None
        smoothing = self.student.label_smoothing
        return build_lesson(network, teaching, self.seed, self.setup, label_smoothing=smoothing, settled=True)


@dataclass(frozen=True)
class Piece:
    """One fine-tuning: of which network, where, and what is done to the network beside the optimizer's steps.

    warm_up: called once, before the first step. before_epoch: called with the epoch's number. masks: by parameter name,
    the weights that stay zero where they are False.
    """

    name: str
    network: Network
    folder: JobFolder
    config: TrainConfig
    warm_up: Callable[[nn.Module, Lesson], None] = lambda model, lesson: None
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def fine_tune(piece: Piece, tutor: Tutor) -> list[dict[str, Any]]:
    """Train a piece, from its checkpoint if there is one; returns the metrics of each epoch. Raises what `train` raises
    and what `Tutor.lesson` raises.
    """
    setup, model = tutor.setup, piece.network.model.to(tutor.setup.device)
    lesson = tutor.lesson(piece.network)
    if not piece.folder.checkpoint.exists():
        piece.warm_up(model, lesson)
    masks = {name: mask.to(setup.device) for name, mask in piece.masks.items()}
    job = Job(
        "compress",
        piece.name,
        model,
        lesson,
        setup.test(piece.network.normalise),
        piece.config,
        tutor.seed,
        piece.folder,
        student_layers(tutor.teaching.main.losses) if tutor.teaching else (),
        piece.before_epoch,
        after_step=lambda trained: apply_masks(trained, masks),
    )
    return train(job, setup.device, setup.watch)
