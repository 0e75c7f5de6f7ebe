"""Students with two classifiers, one for the labels and one for the teacher.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877),
section 4: the distillation token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from kdpipe.stages.config import PathStr, section
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.hooks import ModelOutput, feature_shapes


@section
class Heads:
    """The modules whose outputs [B, num_classes] learn in place of the student's own; that one is evaluated.

    Attributes:
        labels: The path of the classifier that learns the labels, such as "head" of timm's distilled DeiT.
        distillation: That of the one that learns the teacher's logits, such as "head_dist".
    """

    labels: PathStr | None = None
    distillation: PathStr | None = None

    @property
    def layers(self) -> list[str]:
        """The paths of the modules."""
        return [path for path in (self.labels, self.distillation) if path is not None]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the results, for fingerprints; empty by default."""
        return {"heads": asdict(self)} if self.layers else {}

    def of_labels(self, student: ModelOutput) -> ModelOutput:
        """Return the outputs for the losses with the labels."""
        return _from(student, self.labels)

    def of_distillation(self, student: ModelOutput) -> ModelOutput:
        """Return the outputs for the distillation losses."""
        return _from(student, self.distillation)

    def check(self, model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise RecipeError if `model` has no such module, or it does not return logits."""
        for key, path in asdict(self).items():
            if path is None:
                continue
            try:
                found = feature_shapes(model, [path], image_shape)[path]
            except ModelError as error:
                raise RecipeError(f"student.heads.{key}: {error}") from error
            if tuple(found) != (num_classes,):
                raise RecipeError(
                    f"student.heads.{key}: {path!r} returns {list(found)} for each image, and logits of {num_classes} "
                    "classes are wanted: name a classifier of the student."
                )


def second_heads(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the classifiers of a network of timm that averages two, that of distillation last."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    if not hasattr(model, "set_distilled_training") or not callable(get_classifier):
        return
    classifiers = get_classifier()
    paths = {module: path for path, module in model.named_modules()}
    if isinstance(classifiers, tuple) and all(one in paths for one in classifiers):
        yield from (paths[one] for one in classifiers)


def _from(student: ModelOutput, path: str | None) -> ModelOutput:
    return student if path is None else replace(student, logits=student.features[path])
