"""The recipe's `search` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from kdpipe.stages.config import Seed, section, unique

Preset = Literal["temperature-and-alpha", "losses", "layers"]
Objective = Literal["accuracy", "agreement", "parameters", "macs", "size", "latency"]

ACCURACIES = ("accuracy", "agreement")
"""Objectives that are to be high; the others are to be low."""

OF_FILES = ("size", "latency")
"""Objectives that are measured on compressed students' files."""

EPOCH_PRUNERS = ("successive_halving", "hyperband")


@section
class SearchConfig:
    """Configuration of `kdpipe search`, which looks for the best settings of the student's training.

    Attributes:
        space: What is tried: for keys of student and distill a range, { low = 1, high = 20, log = true }, or a list of
            choices; { when = { KEY = [...] }, choices = [...] } for a key that only some choices of another one have.
        preset: A space for a usual question, beside `space`: "temperature-and-alpha", "losses" or "layers".
        trials: Number of settings that are tried.
        objective: What is looked for on the validation images: "accuracy" (the main metric of other tasks), or
            "agreement" with the teacher; or one of these with what is to be low, "parameters" and "macs" of the
            student, "size" in bytes and "latency" of its compressed file: then the result is a Pareto front. Latency
            is that of one image as a share of the recipe's own student in float, measured in turn.
        compress: Whether each trial's student is compressed, as `compress` says, and its compressed network judged.
        sampler: How settings are chosen: "tpe" (tree-structured Parzen estimator), "random", or "grid" for all
            combinations.
        pruner: What ends hopeless trials: "successive_halving" (the default) or "hyperband" after some epochs,
            "wilcoxon" (the default with several `seeds`) after some seeds, or "none" (the default with several
            objectives).
        min_epochs: Epochs before a trial may be ended.
        reduction_factor: One of so many trials goes on at each decision after epochs.
        p_threshold: The p-value below which wilcoxon ends a trial as worse than the best one.
        seed: Seed of the choices.
        seeds: Seeds of the students that each trial trains; it has their mean.
        keep: Number of settings that "keep the best after one epoch", with which the search is compared, trains on.
    """

    space: dict[str, Any] = Field(default_factory=dict)
    preset: Preset | None = None
    trials: Annotated[int, Field(ge=1, le=10_000)] = 50
    objective: Objective | Annotated[tuple[Objective, ...], Field(min_length=1), AfterValidator(unique)] = "accuracy"
    compress: bool = False
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["successive_halving", "hyperband", "wilcoxon", "none"] | None = None
    min_epochs: Annotated[int, Field(ge=1, le=10**6)] = 1
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3
    p_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(unique)] = (0,)
    keep: Annotated[int, Field(ge=1, le=10_000)] = 3

    def __post_init__(self) -> None:
        of_accuracy = [name for name in self.objectives if name in ACCURACIES]
        if len(of_accuracy) != 1:
            raise ValueError("one objective must be accuracy or agreement")
        if not self.compress and (of_files := [name for name in self.objectives if name in OF_FILES]):
            raise ValueError(f"{of_files[0]} is that of a compressed student's file: set search.compress = true")
        if len(self.objectives) > 1 and self.pruner not in (None, "none"):
            raise ValueError("with several objectives no trial can be ended early: leave out the pruner")
        if len(self.seeds) > 1 and self.pruner in EPOCH_PRUNERS:
            raise ValueError("with several seeds trials end between seeds: the pruner must be wilcoxon or none")
        if len(self.seeds) == 1 and self.pruner == "wilcoxon":
            raise ValueError("the pruner wilcoxon compares seeds: give search.seeds several")

    @property
    def is_given(self) -> bool:
        """Whether there is anything to search."""
        return bool(self.space) or self.preset is not None

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives, accuracy or agreement first."""
        names = (self.objective,) if isinstance(self.objective, str) else self.objective
        return tuple(sorted(names, key=lambda name: name not in ACCURACIES))

    @property
    def chosen_pruner(self) -> str:
        """The pruner, or the default one."""
        default = "none" if len(self.objectives) > 1 else "wilcoxon" if len(self.seeds) > 1 else "successive_halving"
        return self.pruner or default
