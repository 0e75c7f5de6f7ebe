"""Prune a student, at once or in steps, each followed by fine-tuning from the stores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.fine_tune import FineTuneContext, FineTuneJob, fine_tune
from kdpipe.stages.compress.names import network_name
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.depth import Ranker
from kdpipe.stages.compress.pruning.kept_channels import kept_channels
from kdpipe.stages.compress.pruning.prune import Pruned, prune
from kdpipe.stages.compress.pruning.sparsity import masks_of
from kdpipe.stages.compress.resume import (
    WIDTHS,
    PrunedCheckpoint,
    TrainedModel,
    cuts_of,
    load_pruned,
    pruned_path,
    save_pruned,
)
from kdpipe.stages.compute.threads import max_threads
from kdpipe.stages.data.tasks import Task
from kdpipe.stages.distillation.adapters import save_adapters
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.evaluate import evaluate
from kdpipe.stages.evaluation.latency import measure_latency
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.store import make_folders
from kdpipe.store.fs.checksums import remove_with_sum

LATENCY_BATCH_SIZE = 16


LATENCY_ROUNDS = 20


def prune_json(config: PruneConfig) -> dict[str, Any]:
    """Return the settings that determine a pruning's result."""
    record = asdict(config)
    if config.importance != "taylor" and not config.is_ranked:
        del record["importance_batches"]
    if len(config.parts) == 1:
        del record["depth_share"]
    if config.steps == 1:
        del record["epochs_per_step"]
    if not config.heads:  # later than the first runs
        del record["heads"]
    return record


def prune_fingerprint(
    config: PruneConfig, train: TrainConfig, fine_tuning: FineTuneContext, source: TrainedModel
) -> dict[str, Any]:
    """Return everything that determines the result."""
    return fine_tuning.fingerprint({"prune": prune_json(config)}, source, train)


def prune_student(
    config: PruneConfig,
    train: TrainConfig,
    fine_tuning: FineTuneContext,
    source: TrainedModel,
    kind: str,
    *,
    ratio: float | None = None,
) -> dict[str, Any]:
    """Prune a student and fine-tune it, in `config.steps` steps, and return its figures.

    A stopped job resumes; a finished one is left untouched. `kind` names its folder; `ratio` is the channel ratio, if
    an earlier search found it.

    Raises:
        ModelError: If it cannot be pruned.
    """
    folder = fine_tuning.job_dir(kind)
    fixed = {} if ratio is None else {"channel_ratio": ratio}
    folder.begin(prune_fingerprint(config, train, fine_tuning, source) | fixed)
    if (done := folder.result()) is not None:
        remove_with_sum(pruned_path(folder))  # left by a kill just before the removal below
        return done
    pruner = _Pruner(config, train, fine_tuning, source, ratio)
    name = f"{network_name(kind, prunes=True)}, seed {fine_tuning.seed}"
    before = PrunedCheckpoint(source.load(), {"channel_ratio": 0.0}, source.adapters if fine_tuning.spec else {})
    for step in range(1, config.steps):
        before = _intermediate(pruner, folder, before, step, name=name)
    pruned = _pruned(pruner, folder, before, config.steps)
    history, losses = fine_tune(_fine_tuning(pruner, pruned, folder, train, name), fine_tuning)
    test = fine_tuning.evaluation(pruned.network.normalize)
    more = {**pruned.facts, **save_adapters(folder, losses), **fine_tuning.examine(pruned.network)}
    figures = finalize(
        folder,
        pruned.network,
        history,
        test,
        with_onnx=fine_tuning.exports_onnx,
        more=more,
        validation=fine_tuning.validation(pruned.network.normalize),
    )
    remove_with_sum(pruned_path(folder))
    return figures


@dataclass(frozen=True)
class _Pruner:
    """The settings that all steps of a pruning share."""

    config: PruneConfig
    train: TrainConfig
    fine_tuning: FineTuneContext
    source: TrainedModel
    ratio: float | None

    def __call__(self, network: ModelBundle, step: int) -> Pruned:
        full, found = self.source.load(), Pruned(network.model, 0.0, {})
        for part in self.config.parts:
            pruned = self._prune(part, replace(network, model=found.model), full, step)
            found = replace(pruned, ranking=[*found.ranking, *pruned.ranking])
        return found

    def _prune(self, config: PruneConfig, network: ModelBundle, full: ModelBundle, step: int) -> Pruned:
        image_shape = self.fine_tuning.evaluation(full.normalize).image_shape
        batch_size, num_batches = self.train.batch_size, config.importance_batches
        gradients = ranker = None
        if config.importance == "taylor":
            gradients = loss_gradients(network, self.fine_tuning, batch_size, num_batches)
        if config.is_ranked:
            ranker = logit_ranker(network, self.fine_tuning, batch_size, num_batches)
        return prune(
            network.model.cpu(),
            torch.zeros(2, *image_shape),
            config,
            full=full.model,
            done=step / config.steps,
            ratio=None if self.ratio is None else self.ratio * step / config.steps,
            gradients=gradients,
            latency=latency_share(full.model, image_shape),
            ranker=ranker,
        )


def _intermediate(
    pruner: _Pruner, folder: JobDir, before: PrunedCheckpoint, step: int, *, name: str
) -> PrunedCheckpoint:
    """Return the network after a step before the last, fine-tuned, loaded or made now."""
    own, fine_tuning = JobDir(folder.path / f"step{step}"), pruner.fine_tuning
    make_folders([own.path])
    if not own.model.exists():
        pruned = _pruned(pruner, own, before, step)
        config = replace(pruner.train, epochs=pruner.config.epochs_per_step)
        title = f"{name}, step {step} of {pruner.config.steps}"
        _, losses = fine_tune(_fine_tuning(pruner, pruned, own, config, title), fine_tuning)
        adapters = losses.state_dict() if losses else {}
        save_pruned(own.model, replace(pruned, adapters=adapters, kept={}))
    for leftover in (own.checkpoint, pruned_path(own)):
        remove_with_sum(leftover)
    return load_pruned(own.model, pruner.source.load())


def _fine_tuning(
    pruner: _Pruner, pruned: PrunedCheckpoint, folder: JobDir, config: TrainConfig, name: str
) -> FineTuneJob:
    """Return the fine-tuning of a pruned network."""
    masks = _masks(pruner.config, pruned.network.model)
    return FineTuneJob(name, pruned.network, folder, config, masks=masks, adapters=pruned.adapters, kept=pruned.kept)


def _pruned(pruner: _Pruner, folder: JobDir, before: PrunedCheckpoint, step: int) -> PrunedCheckpoint:
    """Return the network pruned for a step, before its fine-tuning, from its file or pruned and saved now.

    If a step before exceeded its goal, the next has nothing to do.
    """
    if not pruned_path(folder).exists():
        network, fine_tuning = before.network, pruner.fine_tuning
        pruned = pruner(network, step)
        widths = "channels" in pruner.config.kind or WIDTHS in network.architecture  # of a student pruned before, too
        cuts = cuts_of(pruned.model, widths=widths)
        cut = ModelBundle(pruned.model, {**network.architecture, **cuts}, network.normalize)
        measured = evaluate(cut.model.to(fine_tuning.device), fine_tuning.deciding(cut.normalize), fine_tuning.device)
        facts = {
            "channel_ratio": max(pruned.ratio, before.facts["channel_ratio"]),
            "excluded": dict(pruned.excluded),
            f"{measured.metric.name}_before": measured.value,
        }
        if ranking := [*before.facts.get("removed_blocks", []), *pruned.ranking]:
            facts["removed_blocks"] = [list(block) for block in ranking]  # each with the divergence without it
        if steps := [*before.facts.get("lowered_ranks", []), *map(astuple, pruned.ranks)]:
            facts["lowered_ranks"] = [list(step) for step in steps]
        kept = {}
        if before.adapters and pruned.removed and fine_tuning.spec:
            example = torch.zeros(2, *fine_tuning.evaluation(network.normalize).image_shape)
            layers = student_layers(fine_tuning.spec.without_hint_losses.losses)
            kept = kept_channels(network.model.cpu(), example, layers, pruned.removed)
        save_pruned(pruned_path(folder), PrunedCheckpoint(cut, facts, before.adapters, kept))
    return load_pruned(pruned_path(folder), pruner.source.load())


def _masks(config: PruneConfig, model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of weights that must stay zero; none if whole channels or blocks were removed."""
    return masks_of(model) if config.zeroes_weights else {}


def loss_gradients(
    network: ModelBundle, fine_tuning: FineTuneContext, batch_size: int, num_batches: int
) -> dict[str, Tensor]:
    """Return the gradient of the loss, summed over the first batches of views, by parameter name.

    The loss is that of the fine-tuning without the losses on features: their adapters are untrained, and a gradient
    through them would be meaningless. The network is left without gradients, on the CPU.
    """
    spec = fine_tuning.spec
    if spec is not None:
        spec = spec.of_output([loss for loss in spec.without_hint_losses.losses if loss.on_logits])
    task = replace(fine_tuning, spec=spec).task(network)
    model = network.model.to(fine_tuning.device).eval()
    model.zero_grad(set_to_none=True)
    seed = derive_seed(fine_tuning.seed, "importance")
    for batch in islice(task.stream(seed, batch_size, epoch=0, step=0, epochs=1), num_batches):
        fine_tuning.monitor.check()
        losses = task.losses(ModelOutput(model(batch.images), {}), batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.train().zero_grad(set_to_none=True)
    model.cpu()
    return found


def logit_ranker(network: ModelBundle, fine_tuning: FineTuneContext, batch_size: int, num_batches: int) -> Ranker:
    """Return what chooses blocks, or ranks, by the mean KL divergence, in nats, from the stored logits at T = 1.

    It is a network's, measured on the first batches of views, the same for each call. For the baseline without stores
    it is the cross entropy with the labels; for other tasks than classification the recipe's losses on logits.

    Raises:
        ModelError: The recipe has none.
    """
    spec = fine_tuning.spec
    if spec is not None:
        losses = ranking_losses(fine_tuning.evaluation(network.normalize).task, spec.losses)
        spec = replace(spec.of_output(losses), hard_label_weight=0.0)
    task = replace(fine_tuning, spec=spec).task(network)
    stream = task.stream(derive_seed(fine_tuning.seed, "importance"), batch_size, epoch=0, step=0, epochs=1)
    batches = list(islice(stream, num_batches))

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        model.to(fine_tuning.device).eval()
        fine_tuning.monitor.check()
        total = 0.0
        for batch in batches:
            losses = task.losses(ModelOutput(model(batch.images), {}), batch)
            total += float(torch.stack(list(losses.values())).sum())
        model.train().cpu()
        return total / len(batches)

    read = student_layers(fine_tuning.spec.without_hint_losses.losses) if fine_tuning.spec else ()
    counter = fine_tuning.monitor.counter("compress", "what does least harm to the logits", "choice")
    return Ranker(measure, read, counter)


def ranking_losses(task: Task, losses: Sequence[Loss]) -> list[Loss]:
    """Return the losses that blocks, and ranks, are chosen by, of a recipe for `task` with `losses`.

    Raises:
        ModelError: There are none.
    """
    kl = KD(loss="kd", temperature=1.0, weight=1.0)
    found: list[Loss] = [kl] if task in kl.tasks else [loss for loss in losses if loss.on_logits]
    if not found:
        raise ModelError(
            f"compress.prune.kind = 'blocks' and 'low-rank' go by a loss on logits, and this recipe for {task} has "
            "none: add one to distill, or set the kind to 'channels'."
        )
    return found


def latency_share(full: nn.Module, image_shape: tuple[int, int, int]) -> Callable[[nn.Module], float]:
    """Return a function that measures a network's latency in onnxruntime as a share of that of `full`, in turn."""
    example = torch.zeros(2, *image_shape)
    exported: list[bytes] = []  # of `full`, on first use

    def share(candidate: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            paths = {"full": Path(folder) / "full.onnx", "candidate": Path(folder) / "candidate.onnx"}
            if not exported:
                export_onnx(full, example, paths["full"], metadata={})
                exported.append(paths["full"].read_bytes())
            paths["full"].write_bytes(exported[0])
            export_onnx(candidate, example, paths["candidate"], metadata={})
            found = measure_latency(
                paths, image_shape, [LATENCY_BATCH_SIZE], num_rounds=LATENCY_ROUNDS, num_threads=max_threads()
            )
        return found["candidate"][LATENCY_BATCH_SIZE].p50_ms / found["full"][LATENCY_BATCH_SIZE].p50_ms

    return share
