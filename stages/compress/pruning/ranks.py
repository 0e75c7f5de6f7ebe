"""Choose the ranks of layers that are factored into two (`low_rank`).

Ranks are lowered one level at a time, each time the level that does the least harm to the logits per parameter or
multiply-accumulate saved. Learned ranks: Idelbayev and Carreira-Perpinan, CVPR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.budget import MAX_LATENCIES, Goal, Unreachable, find_ratio
from kdpipe.stages.compress.pruning.channel_groups import output_layers, traceable
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Ranker
from kdpipe.stages.compress.pruning.low_rank import (
    Dense,
    LowRank,
    dense,
    factored,
    highest_rank,
    is_dense,
    matrix_shape,
    ranks_of,
    untrained,
)
from kdpipe.stages.compress.pruning.sparsity import prunable_layers
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import capture, get_module

SHARES = tuple(share / 2**halvings for halvings in range(8) for share in (0.75, 0.5))
"""The levels that a layer's ranks are lowered by: what it then has of its own weights."""


@dataclass(frozen=True)
class RankStep:
    """A layer's rank, lowered by one level.

    Attributes:
        harm: How far the network is from the stored logits with this step and those before it.
    """

    path: str
    rank: int
    harm: float


def lower_ranks(
    model: nn.Module, full: nn.Module, goal: Goal, config: PruneConfig, ranker: Ranker
) -> tuple[float, list[RankStep], dict[str, str]]:
    """Factor layers of `model`, in place, until it reaches the goal.

    Returns the share of the parameters or multiply-accumulates of `full` that it has lost now, the steps that were
    taken, and why each of the other layers stays, by path.

    Raises:
        ModelError: No layer can be factored, or the goal cannot be reached.
    """
    counted = replace(goal, budget="macs") if goal.budget == "latency" else goal
    layers, excluded = find_factorable(model, goal.example, config, by_macs=counted.budget == "macs")
    if not layers:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(excluded.items())[:3])
        raise ModelError(
            f"no layer of this model can be factored ({reasons or 'it has none'}): set compress.prune.kind = "
            "'channels', or take 'prune' out of compress.steps."
        )
    whole, now = counted.size(full), counted.size(model)
    lowest = (now - sum(layer.saving(layer.levels[-1]) for layer in layers)) / whole
    if counted is goal and lowest > goal.share:
        raise _unreachable(goal, lowest, config)
    observe_outputs(model, layers, ranker)
    to_save = math.inf if goal.budget == "latency" else now - math.floor(goal.share * whole + 1e-3)
    steps = list(rank_steps(model, layers, ranker, to_save))
    if goal.budget == "latency":
        steps = steps[: _num_steps(model, layers, steps, goal, config)]
    _take(model, layers, steps)
    return 1 - counted.size(model) / whole, steps, excluded


class Factorable:
    """A layer that may be factored.

    Attributes:
        path: Its module path.
        layer: It as one layer, even if it is two by now.
        levels: The ranks that it may still be lowered to, in falling order.
        now: Its rank; None of one layer.
        positions: How often its weights are used for an image; 1 to count parameters.
    """

    def __init__(self, path: str, layer: Dense, levels: Sequence[int], now: int | None, positions: int) -> None:
        self.path, self.layer, self.levels, self.now, self.positions = path, layer, levels, now, positions
        self._sums: Tensor | None = None  # of its outputs [out], of their products [out, out], and their number
        self._products: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def observe(self, outputs: Tensor) -> None:
        """Add outputs of the layer to the statistics that its basis is made of."""
        rows = (outputs.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else outputs).flatten(0, -2).double()
        sums, products = rows.sum(0).cpu(), (rows.T @ rows).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._products = products if self._products is None else self._products + products
        self._count += len(rows)

    @cached_property
    def basis(self) -> Tensor:
        """Orthonormal columns [out, out], the one along which outputs vary most first."""
        spread = self._products
        if spread is None or self._count == 0 or not torch.isfinite(spread).all():
            weight = self.layer.weight.detach().double().flatten(1).cpu()
            spread = weight @ weight.T
        elif (mean := self.mean) is not None:
            spread = spread - self._count * torch.outer(mean, mean)
        vectors: Tensor = torch.linalg.eigh(spread).eigenvectors
        return vectors.flip(1)

    @property
    def mean(self) -> Tensor | None:
        """The mean [out] of the outputs; None of a layer without a bias, or of one that was not observed."""
        if self._sums is None or self.layer.bias is None or not torch.isfinite(self._sums).all():
            return None
        return self._sums / self._count

    def at(self, rank: int) -> LowRank:
        """Return the two layers of a rank."""
        return factored(self.layer, rank, self.basis, self.mean)

    def saving(self, rank: int, than: int | None = None) -> int:
        """Return what the rank saves, against a higher one or against the rank that it has now."""
        than = self.now if than is None else than
        rows, columns = matrix_shape(self.layer)
        size = rows * columns if than is None else than * (rows + columns)
        return (size - rank * (rows + columns)) * self.positions


def find_factorable(
    model: nn.Module, example: Tensor, config: PruneConfig, *, by_macs: bool
) -> tuple[list[Factorable], dict[str, str]]:
    """Return the layers whose rank can be lowered, in module order, and why each of the others stays, by path."""
    merged, ranks = clone_without_hooks(model), ranks_of(model)
    for path in ranks:
        layers = merged.get_submodule(path)
        assert isinstance(layers, LowRank)
        merged.set_submodule(path, dense(layers))
    paths: dict[nn.Module, list[str]] = {}
    for path, module in merged.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    users: dict[int, int] = {}
    for module in paths:
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = []
    with traceable(merged):
        excluded = [get_module(merged, path) for path in config.exclude]
        weights, reasons = prunable_layers(merged, output_layers(merged, example), excluded, is_2_4=False)
        with torch.no_grad(), capture(weights.values(), lambda output: output.numel()) as sizes:
            merged(example)
        for path, layer in weights.items():
            levels: Sequence[int] = ()
            if not is_dense(layer):
                reasons[path] = f"it computes in groups, or is no plain layer ({type(layer).__name__})"
            elif len(paths[layer]) > 1 or users[id(layer.weight)] > 1:
                reasons[path] = "it is used under several paths"
            elif not sizes[layer]:
                reasons[path] = "the forward does not call it"
            elif not (levels := _levels(layer, config)):
                reasons[path] = (
                    f"it is too small: no rank that is a multiple of prune.round_to ({config.round_to}), within "
                    f"prune.max_ratio ({config.max_ratio:g}), makes its weights fewer"
                )
            elif reason := _failure(merged, path, layer, levels[0], example):
                reasons[path] = reason
            else:
                used = sum(sizes[layer]) // (len(example) * matrix_shape(layer)[0]) if by_macs else 1
                now = ranks.get(path)
                if lower := [rank for rank in levels if now is None or rank < now]:
                    found.append(Factorable(path, layer, lower, now, used))
    order = list(dict(merged.named_modules()))
    return found, {path: reasons[path] for path in order if path in reasons}


def observe_outputs(model: nn.Module, layers: Sequence[Factorable], ranker: Ranker) -> None:
    """Add the outputs of layers, on the batches that networks are ranked by, to the statistics of each."""
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(
                model.get_submodule(layer.path).register_forward_hook(
                    lambda _, __, output, layer=layer: layer.observe(output.detach())
                )
            )
        ranker.harm(model)


def rank_steps(model: nn.Module, layers: Sequence[Factorable], ranker: Ranker, to_save: float) -> Iterator[RankStep]:
    """Yield steps until they save enough: each the one that does the least harm for what it saves.

    As with blocks, what a step did in an earlier round counts as the least that it does now, so that a round measures
    few of them. Of equal ones the first goes. The model is left as it was.
    """
    own = {layer.path: model.get_submodule(layer.path) for layer in layers}
    left = {layer.path: list(layer.levels) for layer in layers}
    by_path, now = {layer.path: layer for layer in layers}, {layer.path: layer.now for layer in layers}
    scores, harms = dict.fromkeys(own, -math.inf), dict.fromkeys(own, math.inf)
    before, saved, total = _finite(ranker.harm(model)), 0, sum(map(len, left.values()))
    try:
        for number in range(total):
            if saved >= to_save:
                return
            measured = set[str]()
            while (path := min(scores, key=scores.__getitem__)) not in measured:
                layer, rank = by_path[path], left[path][0]
                with _replaced(model, path, layer.at(rank)):
                    harms[path] = _finite(ranker.harm(model))
                more = harms[path] - before if math.isfinite(harms[path]) else math.inf
                scores[path] = more / layer.saving(rank, now[path])
                measured.add(path)
            layer, rank = by_path[path], left[path].pop(0)
            saved += layer.saving(rank, now[path])
            now[path], before = rank, harms[path]
            model.set_submodule(path, layer.at(rank))
            scores[path] = -math.inf
            if not left[path]:
                del scores[path]
            ranker.on_progress(number + 1, total)
            yield RankStep(path, rank, before)
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)


def _finite(harm: float) -> float:
    return harm if math.isfinite(harm) else math.inf


@contextmanager
def _replaced(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Have `module` at a path while the block runs."""
    own = model.get_submodule(path)
    model.set_submodule(path, module)
    try:
        yield
    finally:
        model.set_submodule(path, own)


def _take(model: nn.Module, layers: Sequence[Factorable], steps: Sequence[RankStep]) -> nn.Module:
    """Give layers of `model`, in place, the ranks that they have after some steps, and return it."""
    ranks = {step.path: step.rank for step in steps}
    for layer in layers:
        if layer.path in ranks:
            model.set_submodule(layer.path, layer.at(ranks[layer.path]))
    return model


def _num_steps(
    model: nn.Module, layers: Sequence[Factorable], steps: Sequence[RankStep], goal: Goal, config: PruneConfig
) -> int:
    """Return how many steps to take, in order, to reach a goal that is measured."""
    model, share_of_model = goal.measure(model)

    def count(ratio: float) -> tuple[int]:
        return (round(ratio * len(steps)),)

    try:
        ratio = find_ratio(
            count,
            lambda counts: share_of_model(_take(clone_without_hooks(model), layers, steps[: counts[0]])),
            goal.share,
            highest=1.0,
            max_measured=MAX_LATENCIES,
        )
    except Unreachable as end:
        raise _unreachable(goal, end.share, config) from end
    return count(ratio)[0]


def _unreachable(goal: Goal, share: float, config: PruneConfig) -> ModelError:
    return ModelError(
        f"low ranks cannot leave {goal.share:.1%} of this model's {goal.budget}: with the lowest that prune.round_to "
        f"{config.round_to}, prune.max_ratio {config.max_ratio:g} and prune.exclude {list(config.exclude)} allow it is "
        f"{share:.1%}; lower prune.ratio or round_to, raise max_ratio, or exclude less."
    )


def _failure(model: nn.Module, path: str, layer: Dense, rank: int, example: Tensor) -> str | None:
    """Return why the model does not run with a layer in two, None if it does."""
    try:
        with torch.no_grad(), _replaced(model, path, untrained(layer, rank).eval()):
            model(example)
    except Exception as error:
        return f"the model does not run with it in two ({cause(error)})"
    return None


def _levels(layer: Dense, config: PruneConfig) -> list[int]:
    """Return the ranks that a layer may have, in falling order, each of fewer weights than the layer."""
    rows, columns = matrix_shape(layer)
    cost, size, step = rows + columns, rows * columns, config.round_to
    least = step * max(1, math.ceil(round(size * (1 - config.max_ratio) / cost / step, 6)))
    ranks = {max(least, step * round(share * size / cost / step)) for share in SHARES}
    return sorted((rank for rank in ranks if rank <= highest_rank(layer)), reverse=True)
