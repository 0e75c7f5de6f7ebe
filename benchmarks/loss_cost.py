"""Measure the cost of each loss: forward and backward, relative to the student's training step.

    uv run python benchmarks/loss_cost.py [--losses NAME ...] [--batch-sizes B ...] [--rounds N]

The student's step is resnet8x4 on B random 32x32 images: forward, cross entropy with 100 classes, backward, SGD. Step
and loss alternate in one process; the results are the median time of the loss, and of its ratio to the step before.
Losses on maps get one pair of layers, of 64x8x8 and of 256x8x8 on both sides; losses on pooled features vectors of 256.
The teacher's features are in memory as a store would provide them; epoch_cost.py includes reading them. CRD uses its
default number of negatives, out of 50,000 samples. Backward computes the gradients of the student's logits or features
and of the adapters; SimKD's projector, and ReviewKD's fusion with deeper layers, are not included.

at_gradient needs the network itself: the result is how much longer a step with it takes, including the double backward.

The last column is the largest tensor that a loss creates, forward or backward, in MiB. At B = 64 the student's maps of
256x8x8 take 4 MiB, and CRD's embedded negatives 8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Negatives
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.losses.schedules import TrainProgress
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.targets.feature_spec import HEAD, POOLED, FeatureSpec, Shape, compute_statistic, shape_of
from kdpipe.stages.targets.outputs import DenseTargets

NUM_CLASSES, NUM_SAMPLES, VECTOR = 100, 50_000, (256,)
MAPS = ((64, 8, 8), (256, 8, 8))
PROGRESS = TrainProgress(epoch=100, epochs=240)
"""After the warm-up of all losses, which does not change their cost."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A loss at one size.

    Attributes:
        prepare: Undoes the last turn, untimed.
        work: Forward and backward.
        inputs: The tensors that exist before `work`.
        replaces: Whether `work` is a whole step of the student with the loss, compared with one without.
    """

    name: str
    size: str
    prepare: Work
    work: Work
    inputs: Sequence[Tensor]
    replaces: bool = False


def main() -> None:
    kinds = LOSSES.builtin
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=list(kinds), choices=list(kinds), metavar="NAME")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256], metavar="B")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    disable_malloc_trim()  # as the command line does
    torch.manual_seed(0)
    print(f"student's step: resnet8x4, {torch.get_num_threads()} CPU threads; medians of {arguments.rounds} rounds")
    for batch_size in arguments.batch_sizes:
        student = Student(batch_size)
        print(f"\n{'loss':<12} {'B':>4} {'features':>9} {'ms':>8} {'of a step':>10} {'largest tensor, MiB':>20}")
        steps: list[float] = []
        for name in arguments.losses:
            for case in cases(name, kinds[name], student):
                steps += measure(case, student, arguments.rounds)
        print(f"{'step alone':<12} {batch_size:>4} {'':>9} {1000 * statistics.median(steps):8.2f}")


class Student:
    """The student whose training step is the reference: images [B, 3, 32, 32], labels int64 [B]."""

    def __init__(self, batch_size: int) -> None:
        config = ModelConfig(name="resnet8x4")
        self.model = build_model(config, num_classes=NUM_CLASSES, in_channels=3, image_size=(32, 32), seed=0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.randn(batch_size, 3, 32, 32)
        self.labels = torch.randint(NUM_CLASSES, (batch_size,))

    def step(self) -> None:
        self._descend(F.cross_entropy(self.model(self.images), self.labels))

    def step_with(self, loss: nn.Module, teacher: DenseTargets) -> None:
        """Do a step with a loss on the gradient with respect to the pixels too."""
        images = self.images.detach().requires_grad_()
        logits = self.model(images)
        cross_entropy = F.cross_entropy(logits, self.labels, reduction="none")
        (gradient,) = torch.autograd.grad(cross_entropy.sum(), images, create_graph=True)
        ranks = torch.arange(len(images))
        inputs = LossInputs(ModelOutput(logits, {}), teacher, self.labels, ranks, PROGRESS, input_gradient=gradient)
        self._descend(cross_entropy.mean() + loss(inputs).mean())

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def cases(name: str, kind: type[Loss], student: Student) -> Iterator[Case]:
    """Yield the sizes at which a loss is measured, by the features it needs."""
    takes_layers = "layers" in get_type_hints(kind)
    entry: dict[str, Any] = {"loss": name} | ({"layers": (("student", "teacher"),)} if takes_layers else {})
    config = kind(**entry)
    if kind.input_gradient:
        yield through_the_network(config, student)
    elif not (layers := config.student_layers()):
        yield on_features(config, {}, f"{NUM_CLASSES}", len(student.images))
    else:
        required = config.required_features(dict.fromkeys(layers, MAPS[0]))
        is_pooled = all(feature.statistic in (POOLED, HEAD) for feature in required)
        for shape in (VECTOR,) if is_pooled else MAPS:
            size = "x".join(map(str, shape))
            yield on_features(config, dict.fromkeys(layers, shape), size, len(student.images))


def through_the_network(config: Loss, student: Student) -> Case:
    required = config.required_features({})
    features = {feature: compute_statistic(feature, torch.randn_like(student.images)) for feature in required}
    delivered = {feature: tuple(values.shape[1:]) for feature, values in features.items()}
    loss = config.build({}, delivered, DatasetInfo(NUM_SAMPLES, NUM_CLASSES))
    work = partial(student.step_with, loss, DenseTargets(torch.empty(0), features))
    return Case(config.loss, "network", student.optimizer.zero_grad, work, [], replaces=True)


def on_features(config: Loss, shapes: Mapping[str, Shape], size: str, batch_size: int) -> Case:
    """Return a loss on random logits and features, with equal channels on both sides."""
    shape = next(iter(shapes.values()), VECTOR)
    required = dict.fromkeys(config.required_features(shapes), shape)
    features = {
        feature: torch.randn(NUM_CLASSES, shape[0] + 1)
        if feature.is_head
        else compute_statistic(feature, torch.randn(batch_size, *shape))
        for feature in required
    }
    delivered = {feature: shape_of(feature, values) for feature, values in features.items()}
    loss = config.build(shapes, delivered, DatasetInfo(NUM_SAMPLES, NUM_CLASSES)).train()
    leaves = {layer: torch.randn(batch_size, *shape, requires_grad=True) for layer, shape in shapes.items()}
    student = ModelOutput(torch.randn(batch_size, NUM_CLASSES, requires_grad=True), leaves)
    teacher = DenseTargets(torch.randn(batch_size, NUM_CLASSES), features)
    labels, ranks = torch.randint(NUM_CLASSES, (batch_size,)), torch.randperm(NUM_SAMPLES)[:batch_size]
    loss_inputs = LossInputs(student, teacher, labels, ranks, PROGRESS, make_negatives(config, required))

    def prepare() -> None:
        for tensor in (student.logits, *leaves.values(), *loss.parameters()):
            tensor.grad = None

    def work() -> None:
        loss(loss_inputs).mean().backward()

    negatives = loss_inputs.negatives.features.values() if loss_inputs.negatives else ()
    inputs = [student.logits, *leaves.values(), teacher.logits, *features.values(), *negatives]
    return Case(config.loss, size, prepare, work, [*inputs, *loss.parameters(), *loss.buffers()])


def make_negatives(config: Loss, required: Mapping[FeatureSpec, Shape]) -> Negatives | None:
    if not config.num_negatives:
        return None
    count = config.num_negatives
    features = {feature: compute_statistic(feature, torch.randn(count, *shape)) for feature, shape in required.items()}
    return Negatives(features, torch.randint(NUM_CLASSES, (count,)), torch.randint(NUM_SAMPLES, (count,)))


def measure(case: Case, student: Student, num_rounds: int) -> list[float]:
    """Print the case's row, and return the seconds of the student's own steps."""
    steps, times = [], []
    for number in range(num_rounds + 1):
        step_s = seconds(student.step)
        case.prepare()
        time_s = seconds(case.work)
        if number:  # the first round warms up
            steps.append(step_s)
            times.append(time_s - step_s if case.replaces else time_s)
    ratio = statistics.median(time_ / step for time_, step in zip(times, steps, strict=True))
    case.prepare()
    largest = "-" if case.replaces else f"{largest_tensor_bytes(case) / 2**20:.2f}"
    millis = 1000 * statistics.median(times)
    batch_size = len(student.images)
    print(f"{case.name:<12} {batch_size:>4} {case.size:>9} {millis:8.2f} {ratio:10.3f} {largest:>20}", flush=True)
    return steps


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def largest_tensor_bytes(case: Case) -> int:
    with LargestTensor(case.inputs) as mode:
        case.work()
    return mode.num_bytes


class LargestTensor(TorchDispatchMode):
    """Record the largest tensor that any operation creates, backward included."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.num_bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.existing:
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


if __name__ == "__main__":
    main()
