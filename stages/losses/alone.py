"""A loss used alone, in a loop of your own: called with the outputs of student and teacher instead of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.inputs import DatasetInfo, Negatives, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import FINISHED, TrainProgress
from kdpipe.stages.losses.weighted import DistillationBatch, LossSettings, WeightedLoss
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_reduce_sum
from kdpipe.stages.targets.feature_spec import (
    HEAD,
    INPUT_GRADIENT,
    FeatureSpec,
    compute_statistic,
    parse_feature,
    shape_of,
)
from kdpipe.stages.targets.outputs import DenseTargets, TeacherTargets, feature_rows
from kdpipe.stages.targets.resolve import fits
from kdpipe.store.errors import did_you_mean

StudentOutput = Tensor | ModelOutput | Mapping[str, Tensor]
"""Logits [B, num_classes], or logits and features [B, ...] by module path, or these features alone."""

TeacherOutput = StudentOutput | TeacherTargets
"""The same of a teacher, whose features may be statistics ("layer3:pooled"), or targets read from a store."""


class LossContract(LossSettings, Protocol):
    """The attributes of a loss that `LossModule` uses; see `Loss`."""

    @property
    def one_label(self) -> bool: ...
    @property
    def input_gradient(self) -> bool: ...
    @property
    def num_negatives(self) -> int: ...
    def require_classes(self, num_classes: int) -> None: ...
    def student_layers(self) -> tuple[str, ...]: ...
    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]: ...
    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module: ...


class LossModule(nn.Module):
    """A loss with what it trains, such as adapters: its parameters belong to the student's optimizer.

    Attributes:
        config: The settings of the loss.
    """

    def __init__(
        self, config: LossContract, student: StudentOutput, teacher: TeacherOutput, num_samples: int, num_classes: int
    ) -> None:
        super().__init__()
        self.config, self._name = config, type(config).__name__
        output = self._student(student)
        shapes = {layer: tuple(feature.shape[1:]) for layer, feature in output.features.items()}
        self._required = config.required_features(shapes)
        features = self._teacher(teacher, output).features
        served = {feature: shape_of(feature, features[feature]) for feature in self._required}
        info = DatasetInfo(num_samples, num_classes or output.logits.shape[1])
        if info.num_classes:  # not where only features are given
            config.require_classes(info.num_classes)
        self.weighted = WeightedLoss("alone", config, config.build(shapes, served, info))

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput,
        labels: Tensor | None = None,
        *,
        progress: TrainProgress = FINISHED,
        ranks: Tensor | None = None,
        negatives: Negatives | None = None,
        input_gradient: Tensor | None = None,
    ) -> Tensor:
        """Return what training would add for these outputs: weight times the mean loss, a scalar in float32 or wider.

        Args:
            student: Logits [B, num_classes], or logits and features.
            teacher: The teacher's, for the same samples.
            labels: int64 [B], for losses that use them: of labeled samples only.
            progress: The training progress, for schedules and warm-ups; by default all have ended.
            ranks: As in `LossInputs`, for losses with a memory of the samples.
            negatives: As in `LossInputs`, for contrastive losses.
            input_gradient: As in `LossInputs`, for losses that use it.

        Raises:
            RecipeError: The loss needs something that is not given.
        """
        output = self._student(student)
        targets = self._teacher(teacher, output)
        size = len(output.logits)
        self._check_logits(output, targets)
        self._check_labels(labels, size)
        self._check_extras(has_negatives=None not in (negatives, ranks), has_gradient=input_gradient is not None)
        number = self.config.store or 0
        device = output.logits.device
        with torch.autocast(device.type, enabled=False):
            batch = DistillationBatch(
                output.to_float32(),
                [targets] * (number + 1),
                [None] * (number + 1),
                _not_given(size, device) if labels is None else labels,
                _not_given(size, device) if ranks is None else ranks,
                progress,
                {} if negatives is None else {"alone": negatives},
                input_gradient,
                all_reduce_sum(size),
            )
            loss: Tensor = self.weighted(batch, targets)
        return loss

    def _student(self, given: StudentOutput) -> ModelOutput:
        output = _as_output(given, self._name, "student")
        for layer in self.config.student_layers():
            if layer not in output.features:
                raise _missing(self._name, "student", layer, output.features)
        return output

    def _teacher(self, given: TeacherOutput, student: ModelOutput) -> TeacherTargets:
        if isinstance(given, Tensor | ModelOutput | Mapping):
            output = _as_output(given, self._name, "teacher")
            features = {parse_feature(str(name)): feature.detach() for name, feature in output.features.items()}
            targets: TeacherTargets = DenseTargets(to_float32(output.logits.detach()), features)
        elif hasattr(given, "logits_at"):
            targets = given
        else:
            raise _no_output(given, self._name, "teacher")
        served = {feature: _serve(feature, targets.features, self._name) for feature in self._required}
        return _Targets(targets, served)

    def _check_logits(self, student: ModelOutput, teacher: TeacherTargets) -> None:
        if not self.config.on_logits:
            return
        shapes = list(student.logits.shape), list(teacher.logits_at(1.0).shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or not shapes[0][1]:
            raise RecipeError(
                f"{self._name} compares logits [B, num_classes], and got {shapes[0]} of the student and {shapes[1]} of "
                "the teacher: give both, of equal shape."
            )

    def _check_labels(self, labels: Tensor | None, size: int) -> None:
        config = self.config
        if labels is None and (config.one_label or config.samples.needs_single_label or config.num_negatives):
            raise RecipeError(f"{self._name} needs the labels: call it with (student, teacher, labels).")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (size,)):
            found = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            raise RecipeError(f"{self._name} got labels that are {found}: give int64 [{size}].")
        if labels is not None and config.needs_labels and labels.device.type == "cpu" and (labels < 0).any():
            raise RecipeError(f"{self._name} got the label {int(labels.min())}: give it the rows of labeled samples.")

    def _check_extras(self, *, has_negatives: bool, has_gradient: bool) -> None:
        if self.config.num_negatives and not has_negatives:
            raise RecipeError(
                f"{self._name} contrasts with other samples of the data set, which training draws from the store: "
                "call it with ranks=... and negatives=kdpipe.losses.Negatives(...), or train from a store."
            )
        if self.config.input_gradient and not has_gradient:
            raise RecipeError(
                f"{self._name} needs the gradient of the student's cross entropy by the images, [B, C, H, W]: call it "
                "with input_gradient=torch.autograd.grad(cross_entropy.sum(), images, create_graph=True)[0]."
            )


class _NotGiven(Tensor):
    """Labels or ranks that are not given: any use of their values is an error."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__len__, Tensor.__getitem__) or getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise RecipeError("the loss uses the labels or ranks of the samples, which are not given: call it with them.")


def _not_given(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device=device).as_subclass(_NotGiven)


@dataclass(frozen=True)
class _Targets:
    """Outputs of a teacher with the features that a loss requires, computed from what was given."""

    given: TeacherTargets
    features: Mapping[FeatureSpec, Tensor]

    def logits_at(self, temperature: float) -> Tensor:
        return self.given.logits_at(temperature)

    def with_rest_of(self, logits: Tensor) -> _Targets:
        spread = getattr(self.given, "with_rest_of", None)
        return self if spread is None else _Targets(spread(logits), self.features)

    def rows(self, index: Tensor) -> _Targets:
        return _Targets(self.given.rows(index), feature_rows(self.features, index))


def _as_output(given: StudentOutput, name: str, role: str) -> ModelOutput:
    if isinstance(given, ModelOutput):
        return given
    if isinstance(given, Tensor):
        return ModelOutput(given, {})
    if isinstance(given, Mapping) and given and all(isinstance(value, Tensor) for value in given.values()):
        first = next(iter(given.values()))
        return ModelOutput(first.new_empty(len(first), 0), given)
    raise _no_output(given, name, role)


def _no_output(given: object, name: str, role: str) -> RecipeError:
    return RecipeError(
        f"{name} got {type(given).__name__} as the {role}'s output: give logits [B, num_classes], "
        "ModelOutput(logits, features), or features by module path."
    )


def _missing(name: str, role: str, layer: str, given: Iterable[object]) -> RecipeError:
    names = [str(one) for one in given]
    if not names:
        return RecipeError(
            f"{name} needs the {role}'s feature {layer!r}, and only logits are given: pass "
            f"ModelOutput(logits, {{{layer!r}: ...}}) as the {role}'s output."
        )
    hint = did_you_mean(layer, names, otherwise=f"given are {', '.join(names)}.")
    return RecipeError(f"{name} needs the {role}'s feature {layer!r}, which is not given; {hint}")


def _serve(feature: FeatureSpec, given: Mapping[FeatureSpec, Tensor], name: str) -> Tensor:
    """Return a required feature as a store would serve it: as it is given, or computed from the layer's output."""
    for candidate in (feature, replace(feature, size=None)):
        if candidate in given and (candidate == feature or fits(tuple(given[candidate].shape[1:]), feature)):
            return given[candidate]
    whole = FeatureSpec(feature.layer)
    if whole in given and feature.statistic not in (INPUT_GRADIENT, HEAD):
        output = to_float32(given[whole])
        return compute_statistic(feature.for_shape(tuple(output.shape[1:])), output)
    raise _missing(name, "teacher", str(feature), given)
