"""Base classes of losses: the contract between a loss, the recipe, the store and the training.

A loss is a class of settings: the keys of its `[[distill]]` entry, and `build`, which makes the module that computes.
Start from the nearest base class, and register the new class, or list it in `registry.py` if it is to be built in:

- `LogitLoss`: a loss on logits. Override `compute`. `SoftLogitLoss` has the key `temperature` as well.
- `FeatureLoss`: a loss at pairs of layers. Override `build_pair`, and `teacher_feature` if a statistic of the teacher's
  layer, which takes less space in the store than its map, is enough.
- `PooledLoss`: the same for vectors, by default those before the classifiers.
- `MapLoss`: the same for maps [C, H, W] that are pooled to one size, without parameters.
- `RelationLoss` (`relations/relation.py`): relations between the samples of a batch, at pairs of layers.
- `Loss`: anything else. Override `compute`, or `build` if the loss has parameters.

What happens with it, in this order:

1. `student_layers()` are the modules of the student whose outputs are captured by forward hooks.
2. `required_features(student)` are the teacher's features that `cache-teacher` stores and a store must serve.
3. `build(student, teacher, dataset)` gets the shapes of both, without the batch axis, and returns an `nn.Module`. Its
   parameters (adapters, embeddings) train with the student, and are no part of the exported student.
4. The module's `forward` gets `LossInputs`, in float32: `inputs.student.logits` and `inputs.teacher.logits_at(T)` are
   [B, num_classes]; `inputs.student.features[path]` and `inputs.teacher.features[feature]` are maps [B, C, H, W],
   tokens [B, L, C] or vectors [B, D]; the teacher's head, `TEACHER_HEAD`, is [C, D + 1]. It returns the loss without
   `weight`: [B] if `per_sample`, else a scalar for the batch of all processes, whose rows `all_gather_with_grad`
   collects.

`weight`, `store` and `samples` are applied by `WeightedLoss` (`distillation.py`), not by the loss.

Example:
    @register_loss
    class LogitMAE(LogitLoss):
        '''Mean absolute error between the logits of student and teacher.

        Attributes:
            margin: errors up to this size are ignored.
        '''

        paper: ClassVar[str] = "Ours 2026"

        margin: float = 0.0

        def compute(self, inputs: LossInputs) -> Tensor:
            errors = (inputs.student.logits - inputs.teacher.logits_at(1.0)).abs()  # [B, num_classes]
            return (errors - self.margin).relu().mean(1)  # [B]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import KindName, max_value, section
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.alone import LossModule, StudentOutput, TeacherOutput
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Negatives, Shapes, TeacherShapes
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import FINISHED, Scheduled, Temperature, TrainProgress
from kdpipe.stages.losses.shapes import EMBEDDINGS, Layers, Pair, Size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.plugins.user_code import object_sha256
from kdpipe.stages.targets.feature_spec import MAP, POOLED, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to


@section
class Loss:
    """Configuration of a loss: the keys that every `[[distill]]` entry has.

    Attributes:
        weight: factor of the loss.
        store: index into `student.stores` of the teacher to learn from, counted from 0; by default logits come from all
            stores combined, and features from the first.
        samples: which samples the loss is computed on, and their weights.
        view: the kind of view (`views.kinds`) in which the student learns; by default all, and the loss is their mean.
        target_view: the kind of view whose targets it learns, of the same image; by default those of its own view.
        target: "teacher", or "student" for the student's own outputs in `target_view`, without gradient.
    """

    paper: ClassVar[str] = ""
    requires: ClassVar[str] = "logits"  # the required outputs of the teacher, in words, for `kdpipe losses`
    original: ClassVar[object] = None  # the user's class or function, whose source is part of what decides a job
    per_sample: ClassVar[bool] = True  # one value per sample, so that samples can be weighted; else one per batch
    one_label: ClassVar[bool] = False  # needs a single label per sample, which mixed samples do not have
    whole_logits: ClassVar[bool] = False  # needs the teacher's logits of all classes, which top-k stores do not have
    linear: ClassVar[bool] = False  # its gradient is linear in the teacher's probabilities, as sampled labels need
    on_logits: ClassVar[bool] = False  # compares logits
    min_classes: ClassVar[int] = 1  # with fewer it is constant, or not defined
    two_classes: ClassVar[str] = ""  # which part of it is constant with two classes, for a warning
    needs_head: ClassVar[bool] = False  # needs the teacher's last linear layer in the store
    compares_classes: ClassVar[bool] = False  # by what only a teacher of the same classes has, beside its logits
    input_gradient: ClassVar[bool] = False  # uses the gradient of the student's cross entropy by the images
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION, MULTILABEL, REGRESSION)  # what the outputs may be
    later_keys: ClassVar[Mapping[str, Any]] = {"view": None, "target_view": None, "target": "teacher"}

    loss: str = ""  # its name, which registration sets
    weight: Scheduled = 1.0
    store: Annotated[int, Field(ge=0), max_value(1000)] | None = None
    samples: SampleSelection = Field(default_factory=SampleSelection, kw_only=True)
    view: KindName | None = None
    target_view: KindName | None = None
    target: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        if not self.loss:
            raise RecipeError(f"the loss {type(self).__name__} has no name: decorate the class with @kd.register_loss.")

    def source_digests(self) -> dict[str, str]:
        """Return the digest of the source of a user's loss, which is part of what decides a job; none if built in."""
        if is_builtin(self):
            return {}
        return {"source_sha256": object_sha256(type(self).original or type(self), f"loss = {self.loss!r}", RecipeError)}

    @property
    def needs_labels(self) -> bool:
        """Return whether the loss is computed on labeled samples only."""
        return type(self).one_label or self.samples.needs_single_label

    @property
    def num_negatives(self) -> int:
        """Return the number of negatives (other samples of the data set) per batch."""
        return int(vars(self).get("num_negatives", 0))

    @property
    def negative_features(self) -> tuple[FeatureSpec, ...]:
        """Return the teacher features required of the negatives."""
        return ()

    @property
    def reads_logits(self) -> bool:
        """Return whether the loss is on a teacher's logits."""
        return self.on_logits and self.target == "teacher"

    def require_classes(self, num_classes: int) -> None:
        """Raise RecipeError if the loss has nothing to learn from the logits of so few classes."""
        standardized = bool(vars(self).get("standardize", False))
        least = 3 if standardized else self.min_classes
        if num_classes < least:
            fault = "standardized logits of two classes are always the same" if standardized else "it would be constant"
            raise RecipeError(
                f"{self.loss}{' with standardize' * standardized} needs at least {least} classes, and there are "
                f"{num_classes}: {fault}; {'leave that out' if standardized else 'use another loss'}."
            )

    def student_layers(self) -> tuple[str, ...]:
        """Return the paths of the student's modules whose outputs the loss uses."""
        return ()

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        """Return the required teacher features, given the shapes of the student's features."""
        return ()

    def with_widths_of(self, student: Shapes) -> Loss:
        """Return the loss with what `build` derives from these shapes of an unpruned student, for a pruned one."""
        return self

    def temperatures(self) -> tuple[Temperature, ...]:
        """Return the temperatures at which the loss takes the softmax of the teacher's logits."""
        return ()

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        """Build the module that computes the loss from `LossInputs`; by default it calls `compute`.

        Raises:
            RecipeError: The shapes of student and teacher do not match.
        """
        return StatelessModule(self)

    def compute(self, inputs: LossInputs) -> Tensor:
        """Compute a loss that has no parameters: [B] if `per_sample`, else a scalar."""
        raise NotImplementedError

    def __call__(
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

        Arguments are those of `LossModule.forward`.

        Raises:
            RecipeError: The loss has something to train, so that `module` is needed; or an output is missing.
        """
        module = self.module(student, teacher, num_samples=0)
        if next(module.parameters(), None) is not None:
            name = type(self).__name__
            raise RecipeError(
                f"{name} has parameters that train with the student: build it once, module = {name}(...).module("
                "student_output, teacher_output), give module.parameters() to the optimizer, and call the module."
            )
        loss: Tensor = module(
            student,
            teacher,
            labels,
            progress=progress,
            ranks=ranks,
            negatives=negatives,
            input_gradient=input_gradient,
        )
        return loss

    def module(
        self, student: StudentOutput, teacher: TeacherOutput, *, num_samples: int = 0, num_classes: int = 0
    ) -> LossModule:
        """Build the loss as a module for outputs of these shapes, to be used alone as `__call__`.

        Args:
            student: An output of the student, for its shapes.
            teacher: An output of the teacher.
            num_samples: Size of the data set, for losses with a memory of the samples.
            num_classes: By default that of the logits.
        """
        return LossModule(self, student, teacher, num_samples, num_classes)


def is_builtin(loss: Loss) -> bool:
    """Return whether a loss is one of kdpipe's, and not a user's."""
    written: Any = type(loss).original or type(loss)
    return bool(written.__module__.partition(".")[0] == "kdpipe")


class StatelessModule(nn.Module):
    """A loss without parameters, computed by its configuration."""

    def __init__(self, config: Loss) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.config.compute(inputs)


@section
class LogitLoss(Loss):
    """Configuration of a loss on logits.

    Attributes:
        standardize: normalize the logits of student and teacher to mean 0 and standard deviation 1 over the classes
            first (Sun et al. 2024, arXiv 2403.01427).
        rest: how the mass of the classes that a top-k store does not keep is spread over them: "equal", or as the
            "student" has it, so that only their sum is compared.
    """

    requires: ClassVar[str] = "logits"
    on_logits: ClassVar[bool] = True

    standardize: bool = False
    rest: Literal["equal", "student"] = "equal"


@section
class SoftLogitLoss(LogitLoss):
    """Configuration of a loss on softened logits.

    Attributes:
        temperature: T of both softmaxes.
    """

    min_classes: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION,)

    temperature: Temperature = 4.0

    def temperatures(self) -> tuple[Temperature, ...]:
        return (self.temperature,)


@section
class FeatureLoss(Loss):
    """Configuration of a loss on pairs of layers.

    Attributes:
        layers: pairs of (student layer, teacher layer), by module path.
    """

    requires: ClassVar[str] = "map [C, H, W] of each layer"

    layers: Layers = Field(kw_only=False)

    def student_layers(self) -> tuple[str, ...]:
        return tuple(student_layer for student_layer, _ in self.layers)

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return tuple(
            self.teacher_feature(teacher_layer, student.get(layer, ())) for layer, teacher_layer in self.layers
        )

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        """Return the required feature of a teacher's layer, given the shape of the student's."""
        return FeatureSpec(layer, MAP)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        features = self.required_features(student)
        return PairedModule(
            self.student_layers(),
            features,
            [
                self.build_pair(pair, feature, student[pair[0]], teacher[feature])
                for pair, feature in zip(self.layers, features, strict=True)
            ],
        )

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        """Build the module of one pair of layers, which the loss is summed over.

        It maps the student's feature [B, *student] and the teacher's [B, *teacher] to [B] if `per_sample`, else to a
        scalar.

        Raises:
            RecipeError: The shapes do not match.
        """
        raise NotImplementedError


class PairedModule(nn.Module):
    """The sum of a loss over pairs of layers: `pairs` has the module of each pair."""

    def __init__(self, layers: Sequence[str], features: Sequence[FeatureSpec], pairs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sources = tuple(zip(layers, features, strict=True))
        self.pairs = nn.ModuleList(pairs)

    def forward(self, inputs: LossInputs) -> Tensor:
        parts = [
            loss(inputs.student.features[layer], inputs.teacher.features[feature])
            for loss, (layer, feature) in zip(self.pairs, self.sources, strict=True)
        ]
        return torch.stack(parts).sum(0)


@section
class PooledLoss(FeatureLoss):
    """Configuration of a loss on vectors, to which maps are average-pooled.

    Attributes:
        layers: pairs of (student layer, teacher layer), of which maps are average-pooled to vectors; by default what
            goes into the classifiers, or what a teacher without one returns.
    """

    requires: ClassVar[str] = "pooled vector [C] of each layer"
    statistic: ClassVar[str] = POOLED

    layers: Layers = Field(default=EMBEDDINGS, kw_only=False)

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, self.statistic)


@section
class MapLoss(FeatureLoss):
    """Configuration of a per-sample loss on feature maps of equal aspect ratio, the larger average-pooled first."""

    expected: ClassVar[str] = "layers whose maps have the same aspect ratio"
    """What to choose instead, for the error message about shapes that do not match."""

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        """Return the (H, W) of a teacher's feature, to which the student's maps are pooled; None if it has none."""
        raise NotImplementedError

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        """Compute the loss of each sample, [B], from pooled student maps [B, C, H, W] and the teacher's feature."""
        raise NotImplementedError

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        size = self.common_size(student, teacher, feature)
        if size is None or not poolable(student, size):
            raise shape_mismatch_error(self.loss, pair, student, teacher, self.expected)
        return MapModule(self, feature, size)


class MapModule(nn.Module):
    """The distance of the student's maps, pooled to (H, W) = `size`, from the teacher's feature, [B]."""

    def __init__(self, config: MapLoss, feature: FeatureSpec, size: Size) -> None:
        super().__init__()
        self.config = config
        self.feature = feature
        self.size = size

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.config.distance(pool_to(to_float32(student), self.size), teacher, self.feature)
