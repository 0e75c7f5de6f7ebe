"""Losses that users write: a class that derives from `Loss`, a function of logits, or a torch module of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.errors import PydanticUserError
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.losses.base import FeatureLoss, LogitLoss, Loss, is_builtin
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import FINISHED
from kdpipe.stages.losses.weighted import DistillationBatch, WeightedLoss
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.runtime.memory import is_out_of_memory
from kdpipe.stages.targets.outputs import DenseTargets
from kdpipe.store.errors import KdpipeError

GIVEN = ("num_classes", "num_samples")
"""Keywords of a module's `__init__` that are no keys: the sizes of the data set."""

MAX_INPUTS = 3

NUM_TRIED = 4
"""Samples of the batch on which a loss is tried."""


@section
class CalledLoss(LogitLoss):
    """A loss on logits that a user's function or torch module computes, with its keywords for keys."""

    requires: ClassVar[str] = "logits of all classes"
    whole_logits: ClassVar[bool] = True  # it may be any function of the logits, at any temperature
    own_keys: ClassVar[tuple[str, ...]] = ()

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        function: Any = type(self).original
        keys = {key: getattr(self, key) for key in self.own_keys}
        if not isinstance(function, type):
            return LossCall(self, partial(function, **keys))
        taken = inspect.signature(function).parameters
        return LossCall(self, function(**keys, **{name: getattr(dataset, name) for name in GIVEN if name in taken}))


class LossCall(nn.Module):
    """A user's function or module of (student_logits, teacher_logits[, labels]), called with `LossInputs`."""

    def __init__(self, config: CalledLoss, function: Callable[..., object]) -> None:
        super().__init__()
        self.config, self.function = config, function

    def forward(self, inputs: LossInputs) -> Tensor:
        tensors = [inputs.student.logits, to_float32(inputs.teacher.logits_at(1.0))]
        tensors += [inputs.labels] if self.config.one_label else []
        if not self.config.per_sample:
            tensors = [all_gather_with_grad(tensor) for tensor in tensors]
        loss = self.function(*tensors)
        if not isinstance(loss, Tensor):
            raise RecipeError(f"the loss {self.config.loss} returned {type(loss).__name__}: return a tensor.")
        return to_float32(loss)


@cache
def as_loss(found: Any, name: str, per_sample: bool | None = None) -> type[Loss]:
    """Return the class of a user's loss under a name.

    Args:
        found: A class that derives from `Loss`; a function of (student_logits, teacher_logits[, labels]) with
            keyword-only arguments for keys; or a class of torch modules with such a `forward`, whose `__init__` has
            the keys.
        name: The value of its key `loss` in recipes.
        per_sample: Whether a function or module returns [B], and not one value for the batch; found by a call with
            defaults if None.

    Raises:
        RecipeError: It is nothing of these, or its keys cannot be keys of a recipe.
    """
    try:
        if isinstance(found, type) and issubclass(found, Loss):
            return _named(found, name)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return _from_module(found, name, per_sample)
        if inspect.isfunction(found):
            return _from_function(found, name, per_sample)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        raise RecipeError(f"the loss {name} cannot be used: {cause(error)}") from error
    raise RecipeError(
        f"{name} is {found!r:.80}, not a loss: it must be a class that derives from kdpipe.losses.Loss, a function of "
        "(student_logits, teacher_logits), or a class of torch modules with such a forward."
    )


def try_loss(loss: Loss, module: nn.Module, student: Shapes, teacher: TeacherShapes, num_classes: int) -> None:
    """Run a user's loss once on made-up outputs of these shapes, so that its mistakes show before a training.

    Losses that are built in, contrastive or use the input's gradient are left out.

    Raises:
        RecipeError: It fails, or returns another shape than it should.
    """
    if type(loss).original is None or loss.num_negatives or loss.input_gradient:
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(NUM_TRIED, *shape, generator=generator)

    output = ModelOutput(
        drawn(num_classes).requires_grad_(), {layer: drawn(*shape) for layer, shape in student.items()}
    )
    targets = DenseTargets(drawn(num_classes), {feature: drawn(*shape) for feature, shape in teacher.items()})
    number, ranks = (loss.store or 0) + 1, torch.arange(NUM_TRIED)
    batch = DistillationBatch(output, [targets] * number, [None] * number, ranks % num_classes, ranks, FINISHED, {})
    try:
        WeightedLoss("tried", loss, module)(batch, targets)
    except RecipeError:
        raise
    except Exception as error:  # a user's code
        raise RecipeError(f"it fails on a batch of logits [{NUM_TRIED}, {num_classes}] ({cause(error)}).") from error


@contextmanager
def failure_of(loss: Loss) -> Iterator[None]:
    """Raise RecipeError for an error in a user's loss; memory that ran out is not its fault."""
    try:
        yield
    except KdpipeError:
        raise
    except Exception as error:  # a user's code
        if is_builtin(loss) or is_out_of_memory(error):
            raise
        raise RecipeError(f"the loss {loss.loss} failed in training ({cause(error)}): correct it.") from error


def _named(found: type[Loss], name: str) -> type[Loss]:
    """Return a subclass with another value of the key `loss`."""
    if found.build is Loss.build and found.compute is Loss.compute:
        raise RecipeError(f"the loss {name} computes nothing: override compute (or build) of {found.__name__}.")
    if issubclass(found, FeatureLoss) and (found.build, found.build_pair) == (
        FeatureLoss.build,
        FeatureLoss.build_pair,
    ):
        raise RecipeError(f"the loss {name} computes nothing: override build_pair of {found.__name__}.")
    checked: Any = found if "__dataclass_fields__" in vars(found) else section(found)
    return _subclass(checked, found.original or found, name, {}, {})


def _from_function(function: Callable[..., object], name: str, per_sample: bool | None) -> type[Loss]:
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    keys = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    takes_labels = _takes_labels(parameters, name)
    if per_sample is None:
        per_sample = _is_per_sample(lambda: function, takes_labels)
    return _called(function, name, keys, {"per_sample": per_sample, "one_label": takes_labels})


def _from_module(module: type[nn.Module], name: str, per_sample: bool | None) -> type[Loss]:
    parameters = inspect.signature(module, eval_str=True).parameters
    keys = [one for one in parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    takes_labels = _takes_labels(list(inspect.signature(module.forward).parameters.values())[1:], name)
    if per_sample is None:
        sizes = {given: 3 for given in GIVEN if given in parameters}
        per_sample = _is_per_sample(lambda: module(**sizes), takes_labels)
    keys = [one for one in keys if one.name not in GIVEN]
    return _called(module, name, keys, {"per_sample": per_sample, "one_label": takes_labels})


def _takes_labels(parameters: Sequence[inspect.Parameter], name: str) -> bool:
    """Return whether a function of logits takes the labels too."""
    inputs = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if not 2 <= len(inputs) <= MAX_INPUTS or (len(inputs) == MAX_INPUTS and inputs[2].name != "labels"):
        raise RecipeError(
            f"the loss {name} takes ({', '.join(one.name for one in inputs)}): it must take (student_logits, "
            "teacher_logits) or (student_logits, teacher_logits, labels), and its keys after a `*`."
        )
    return len(inputs) == MAX_INPUTS


def _is_per_sample(build: Callable[[], Callable[..., object]], takes_labels: bool) -> bool:
    """Return whether a loss does not return a single value for a batch of two, or cannot be called with defaults."""
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    labels = [torch.tensor([0, 1])] if takes_labels else []
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            loss = build()(logits, logits.flip(0), *labels)
    except Exception:  # a user's code: it may need keys that have no default
        return True
    return not (isinstance(loss, Tensor) and loss.dim() == 0)


def _called(function: Any, name: str, keys: Sequence[inspect.Parameter], properties: Mapping[str, Any]) -> type[Loss]:
    annotations, defaults = {}, {}
    for key in keys:
        if key.annotation is key.empty:
            raise RecipeError(f"the key {key.name} of the loss {name} has no type: write `{key.name}: float`, say.")
        if hasattr(CalledLoss, key.name) or key.name in {field.name for field in fields(CalledLoss)}:
            raise RecipeError(f"the loss {name} cannot have a key {key.name!r}, which every loss has: rename it.")
        annotations[key.name] = key.annotation
        if isinstance(key.default, list | dict | set):
            defaults[key.name] = Field(default_factory=partial(deepcopy, key.default))
        elif key.default is not key.empty:
            defaults[key.name] = key.default
    own = {"own_keys": tuple(annotations), **properties}
    return _subclass(CalledLoss, function, name, annotations, {**defaults, **own})


def _subclass(
    base: type[Loss], original: Any, name: str, annotations: Mapping[str, Any], values: Mapping[str, Any]
) -> type[Loss]:
    text = inspect.cleandoc(original.__doc__ or "") or f"{name}, without a description."
    namespace = {
        **values,
        "__annotations__": {**annotations, "loss": Literal[name]},
        "__doc__": text.replace("\n\nArgs:\n", "\n\nAttributes:\n"),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "loss": name,
        "original": original,
    }
    return section(type(original.__name__, (base,), namespace))
