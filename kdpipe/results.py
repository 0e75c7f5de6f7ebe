"""Results of the Python API: figures with types, and the files behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.arguments import as_file
from kdpipe.models import remembering
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.main_metric import main_percent, main_value, metric_of
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.store import write_atomically
from kdpipe.store.fs.checksums import require_intact
from kdpipe.student_job import StudentJob


@dataclass(frozen=True, eq=False)
class Result:
    """The results of a trained network.

    Attributes:
        figures: All figures, as in result.json.
        folder: The folder with its weights, ONNX file, metrics and results.
    """

    figures: Mapping[str, Any]
    folder: Path

    @property
    def metric(self) -> str:
        """The main metric: "accuracy", or where no test image has a label "agreement" with the teacher.

        Of several labels it is "mAP", or "decisions", those made as by the teacher; of numbers "r2", or "teacher_r2".
        """
        return metric_of(self.figures).name

    @property
    def value(self) -> float:
        """The value of `metric` on the test images after the last epoch, 1 at most."""
        return main_value(self.figures)

    @property
    def accuracy(self) -> float:
        """Accuracy on the labeled test images after the last epoch, in [0, 1].

        Raises:
            RunError: No test image has a class: see `value`.
        """
        return _accuracy(self.figures)

    @property
    def best_accuracy(self) -> float:
        """Accuracy after the best epoch, in [0, 1], on the validation images, or without any on the test images.

        Raises:
            RunError: None of these images has a label.
        """
        return _accuracy(self.figures, "best_accuracy")

    @property
    def cross_entropy(self) -> float:
        """Mean cross entropy on the test images, in nats."""
        return float(self.figures["cross_entropy"])

    @property
    def num_parameters(self) -> int:
        """Number of parameters, without buffers."""
        return int(self.figures["num_parameters"])

    @property
    def num_macs(self) -> int | None:
        """Multiply-accumulates for one image; None if they cannot be counted."""
        found: int | None = self.figures.get("num_macs")
        return found

    @property
    def agreement(self) -> float | None:
        """Share of test images with the teacher's top-1 class; None without a test store."""
        found: float | None = (self.figures.get("examined") or {}).get("agreement")
        return found

    @property
    def history(self) -> list[dict[str, Any]]:
        """Accuracy, losses, learning rate and time of each epoch."""
        path = self.folder / "metrics.jsonl"
        require_intact(path)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def export(self, path: str | Path) -> Path:
        """Copy the network to `path`: as ONNX (.onnx) or as weights with a record (.safetensors).

        Raises:
            RunError: There is no file of this kind.
        """
        return _copy(self.folder / f"model{Path(path).suffix}", path)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.metric}={main_percent(self.figures):.2f} %, "
            f"{self.num_parameters:,} parameters, folder={str(self.folder)!r})"
        )


@dataclass(frozen=True, repr=False, eq=False)
class TeacherResult(Result):
    """The results of a trained teacher.

    Attributes:
        model: The network, which was trained in place.
    """

    model: nn.Module


@dataclass(frozen=True, repr=False, eq=False)
class StudentResult(Result):
    """The results of a trained student.

    Attributes:
        job: How it was trained, from which `compress` continues.
    """

    job: StudentJob

    @cached_property
    def bundle(self) -> ModelBundle:
        """The trained network with its input scaling: maps uint8 images [B, C, H, W] to logits [B, num_classes]."""
        return remembering(self.job.load(self.folder))

    @property
    def model(self) -> nn.Module:
        """The trained network, in eval mode on the CPU, for normalized images."""
        return self.bundle.model


@dataclass(frozen=True, eq=False)
class CompressedResult:
    """The results of a pruned or quantized student.

    Attributes:
        networks: The results of each network that was made, such as `pruned` and `int8`, in order.
        folder: The folder of the exported artifacts: one of each network, and their ranking.
        card: The content of its card.json: the ranking, sizes, latencies, and where the student comes from.
        final: The name of the final network: the last that was made.
        load: Returns the network from its weights file.
        run: The run folder of the student.
    """

    networks: Mapping[str, Result]
    folder: Path
    card: Mapping[str, Any]
    final: str
    load: Callable[[Path], ModelBundle]
    run: Path

    @property
    def recommended(self) -> str:
        """Name of the smallest network that reaches 99 % of the best one's accuracy; the unchanged one is `student`."""
        return str(self.card["ranking"][0])

    @property
    def accuracy(self) -> float:
        """Accuracy of the final network on the labeled test images, in [0, 1].

        Raises:
            RunError: No test image has a label: see the `agreement` of `networks`.
        """
        return _accuracy(self.card["networks"][self.final])

    @property
    def num_bytes(self) -> int:
        """Size of the final network's ONNX file."""
        return (self.folder / self.final / "model.onnx").stat().st_size

    @cached_property
    def bundle(self) -> ModelBundle:
        """The final network with its input scaling, rounding as its integer file does."""
        return remembering(self.load(self.folder / self.final / "model.safetensors"))

    @property
    def model(self) -> nn.Module:
        """The final network, in eval mode on the CPU, for normalized images."""
        return self.bundle.model

    def export(self, path: str | Path) -> Path:
        """Copy the final network to `path`: as ONNX (.onnx), weights (.safetensors) or torch.export program (.pt2).

        Raises:
            RunError: There is no file of this kind.
        """
        return _copy(self.folder / self.final / f"model{Path(path).suffix}", path)

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {main_percent(row):.2f} %" for name, row in self.card["networks"].items())
        return f"CompressedResult({names}, folder={str(self.folder)!r})"


def _accuracy(figures: Mapping[str, Any], key: str = "accuracy") -> float:
    if key not in figures:
        raise RunError(
            f"there is no accuracy without classes of test images: see `value`, the {metric_of(figures).title}."
        )
    return float(figures[key])


def _copy(source: Path, path: str | Path) -> Path:
    if not source.parent.is_dir():
        raise RunError(f"the folder {source.parent} of this network is gone: make it again.")
    target = as_file("path", path)
    if not source.is_file():
        kinds = sorted({file.suffix for file in source.parent.glob("model*.*")})
        raise RunError(f"{source.parent} has no {source.suffix or 'such'} file: choose from {', '.join(kinds)}.")
    require_intact(source)
    write_atomically(target, source.read_bytes())
    return target
