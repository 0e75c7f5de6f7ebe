"""What the trials of a search are judged by: accuracy, and what is to be low beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from kdpipe.pipeline.commands.variants.trainings import Training
from kdpipe.pipeline.recipe.search.config import SearchConfig
from kdpipe.pipeline.run import Run
from kdpipe.stages.compute.threads import max_threads
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.evaluation.latency import measure_latency
from kdpipe.stages.evaluation.main_metric import main_value
from kdpipe.stages.export.onnx_export import export_onnx

LATENCY = "latency"


@dataclass(frozen=True)
class Objectives:
    """The objectives of a run's search.

    Attributes:
        run: The run.
        config: The recipe's section `search`.
        folder: The search's folder, which has the file that latencies are compared with.
    """

    run: Run
    config: SearchConfig
    folder: Path

    @property
    def others(self) -> Sequence[str]:
        """The objectives beside accuracy or agreement."""
        return self.config.objectives[1:]

    def measured(self, training: Training, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return the results of a training with its latency, if that is an objective."""
        measured = {LATENCY: self._latency_share(training)} if LATENCY in self.others else {}
        return {**result, **measured}

    def value(self, objective: str, result: Mapping[str, Any]) -> float:
        """Return what results are in an objective."""
        match objective:
            case "parameters" | "macs":
                return float(result[f"num_{objective}"])
            case "size":
                return float(result["onnx_bytes"])
            case "latency":
                return float(result[LATENCY])
        return main_value(result)

    def means(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the mean over seeds in each objective, accuracy or agreement first."""
        return [mean(self.value(name, result) for result in results) for name in self.config.objectives]

    def _latency_share(self, training: Training) -> float:
        """Measure the time of an image in a training's compressed file, as a share of the recipe's student in float.

        Both take turns in one process, so that a busy machine slows both.
        """
        paths = {"student": training.file, "reference": self._reference()}
        rounds, threads = training.compress.latency_rounds if training.compress else 0, max_threads()
        found = measure_latency(paths, None, [1], num_rounds=rounds, num_threads=threads)
        return found["student"][1].p50_ms / found["reference"][1].p50_ms

    def _reference(self) -> Path:
        """Return the file of the recipe's student in float, untrained, as weights do not change its latency."""
        path, student = self.folder / "reference.onnx", self.run.recipe.student
        if not path.exists():
            context = student.context(self.run.context)
            network = build_student(student, student.seeds[0], context)
            export_onnx(network.model, torch.zeros(2, *context.image_shape), path, metadata={})
        return path
